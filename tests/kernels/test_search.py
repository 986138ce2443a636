"""The inner loop of searched scales: every row against float64, and the rows against each other, bit for bit."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.formats import _native

ISAS = ["scalar", "avx2", ""]  # a row this CPU lacks gives way to the next
KINDS = ["none", "int", "real"]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if _native.extension() is None:
        pytest.skip("the kernels are not compiled")


def reference(w: Tensor, h: "Tensor | None", scale: Tensor, zero: "Tensor | None", real: bool, norm: float) -> Tensor:
    """Levels -7 .. 8."""
    s = scale.double()
    x, z = w.double() / torch.where(s > 0, s, 1.0), torch.zeros_like(s) if zero is None else zero.double()
    q = (x.float().double() + z).float().round() if real else x.float().round() + z
    d = (((q.double().clamp(-7, 8) - z) * s) - w.double()).abs() ** norm
    return (d if h is None else d * h.double()).sum(2, keepdim=True)


@pytest.mark.parametrize("n, kind", list(product([1, 15, 16, 17, 64, 70], KINDS)))
def test_every_row_gives_the_cost_of_the_nearest_levels(n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(n)
    w = torch.randn(130, n, generator=g)
    w[0], w[1, 0] = 0.0, 1e6
    scale = torch.rand(5, 130, 1, generator=g) + 0.05
    scale[:, 0] = 0.0
    zero = {"none": None, "int": torch.randint(-3, 4, scale.shape).float(), "real": torch.randn(scale.shape)}[kind]
    h = torch.rand(130, n, generator=g).mul_(torch.rand(130, n, generator=g) > 0.2)
    for norm, weights in product([2.4, 2.0, 1.0], [None, h]):
        found = []
        for isa in ISAS:
            monkeypatch.setenv("LOWBIT_ISA", isa)
            found.append(_native.scale_errors(w, weights, scale, zero, -7.0, 8.0, kind == "real", norm))
        expected = reference(w, weights, scale, zero, kind == "real", norm).float()
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    w, scale = np.zeros((4, 8), np.float32), np.ones((3, 4), np.float32)
    none, error = np.zeros((0, 0), np.float32), np.zeros((3, 4), np.float32)
    run = _native.extension().scale_errors
    run(w, none, scale, none, -1.0, 1.0, False, 2.0, error, 1, "")
    for bad in (
        (w, none, scale[:, :3].copy(), none),
        (w, w[:3].copy(), scale, none),
        (w, none, scale, scale[:2].copy()),
    ):
        with pytest.raises(ValueError):
            run(*bad, -1.0, 1.0, False, 2.0, error, 1, "")
    with pytest.raises(ValueError, match="norm"):
        run(w, none, scale, none, -1.0, 1.0, False, 0.0, error, 1, "")
