"""Exceptions beside a packed product: every row against float64, both layouts, any shape, damaged places."""

import numpy as np
import pytest
import torch

from lowbit.errors import KernelError
from lowbit.formats import Format, split_quantize
from lowbit.runtime import PackedLinear, kernels
from lowbit.runtime import sparse as module
from lowbit.runtime.sparse import Sparse, row_factors, sparse, sparse_linear

ROWS = [isa for op, isa, supported in kernels._extension().table() if op == "sparse_linear" and supported]
SHAPES = [
    (1, 1, 1.0),
    (5, 70, 1.0),
    (16, 33, 0.0),
    (37, 300, 0.1),
    (33, 129, 0.02),
    (3, 2000, 0.3),
    (0, 8, 0.5),
    (150, 300, 0.05),
    (64, 128, 1.0),
]
EVERY = pytest.mark.parametrize("isa", ROWS)


def problem(
    n: int, k: int, density: float, integer: bool, seed: int = 0, levels: int = 0
) -> tuple[Sparse, torch.Tensor]:
    """The prepared matrix, and what it stands for in float64. levels: different values there are; 0: any."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=random) < density
    row, column = mask.nonzero(as_tuple=True)
    value = torch.randn(len(row), generator=random)
    if levels:
        value = torch.randint(1, levels + 1, (len(row),), generator=random) * torch.tensor(-0.5)
    s = sparse(row, column, value, (n, k), integer)
    dense = torch.zeros(n, k, dtype=torch.float64)
    dense[row, column] = s.value.double()
    off = (s.value - value).abs()
    assert bool((off <= (value.abs().max() if len(value) else 0) / 253).all()) and (integer or not bool(off.any()))
    return s, dense


@EVERY
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 70])
def test_any_shape(isa: str, integer: bool, tokens: int) -> None:
    for i, (n, k, density) in enumerate(SHAPES):
        s, dense = problem(n, k, density, integer, i)
        x, y = torch.randn(tokens, k), torch.randn(tokens, n)
        want = y.double() + x.double() @ dense.T
        size = y.double().abs() + x.double().abs() @ dense.abs().T
        rounded = x.abs().amax(1, keepdim=True) / 2**15 * dense.abs().sum(1) if integer and 0 < tokens < 8 else 0
        sparse_linear(x, y, s, isa)
        assert bool(((y - want).abs() <= (130 + k / 64) * 2**-24 * size + rounded + 1e-30).all()), (n, k)


@pytest.mark.parametrize("levels", [0, 1, 7, 8])  # from eight on a row's values have no codes of their own
@pytest.mark.parametrize("isa", ROWS)
def test_integer_rows_are_equal_bit_for_bit(isa: str, levels: int) -> None:
    for i, (n, k, density) in enumerate(SHAPES):
        s, _ = problem(n, k, density, True, i, levels)
        assert s.coded or n == 0 or levels in (0, 8)
        assert not s.coded or n * k * density < 300 or levels in (1, 7)
        for tokens in range(1, 8):
            x, start = torch.randn(tokens, k), torch.randn(tokens, n)
            a, b = start.clone(), start.clone()
            sparse_linear(x, a, s, isa)
            sparse_linear(x, b, s, "scalar")
            assert torch.equal(a, b)
            alone = start[-1:].clone()  # whatever is beside it
            sparse_linear(x[-1:].contiguous(), alone, s, isa)
            assert torch.equal(alone[0], a[-1])


@EVERY
def test_extreme_values_do_not_overflow(isa: str) -> None:
    """Every place taken, all values and activations at their largest and of one sign: 70000 products in a row."""
    k = 70000
    row, column = torch.ones(1, k).nonzero(as_tuple=True)
    for sign in (1.0, -1.0):
        s = sparse(row, column, torch.full((k,), 127 * sign), (1, k), integer=True)
        y = torch.zeros(1, 1)
        sparse_linear(torch.full((1, k), 16383.0), y, s, isa)
        assert float(y) == pytest.approx(sign * 127 * 16383 * k, rel=1e-6)


@EVERY
@pytest.mark.parametrize("integer", [False, True])
def test_non_finite_activations_stay_in_their_token(isa: str, integer: bool) -> None:
    s, _ = problem(20, 64, 1.0, integer)
    x, y = torch.randn(3, 64), torch.zeros(3, 20)
    x[1, 5] = float("nan")
    sparse_linear(x, y, s, isa)
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


def test_levels_of_one_scale_are_exact() -> None:
    row = torch.tensor([0, 0, 0, 1, 1, 3])
    value = torch.tensor([-1.5, 0.5, 1.5, 0.7, -2.1, 0.123]) * 0.37
    assert torch.allclose(row_factors(row, value, 5), torch.tensor([0.5, 0.7, 0, 0.123, 0]) * 0.37)
    s = sparse(row, torch.tensor([0, 1, 2, 0, 1, 2]), value, (5, 3), integer=True)
    assert torch.allclose(s.value, value, rtol=1e-6)


@pytest.mark.parametrize("column", [[0, 8], [-1, 2], [3, 3], [3, 2]])
def test_impossible_places_are_refused(column: list[int]) -> None:
    with pytest.raises(KernelError, match="outside 0..7 or does not rise"):
        sparse(torch.tensor([1, 1]), torch.tensor(column), torch.ones(2), (3, 8))


def test_a_layout_of_another_matrix_is_refused() -> None:
    s, _ = problem(16, 32, 0.2, False)
    x, y = torch.zeros(1, 32), torch.zeros(1, 16)
    for steps in (s.steps[:-1], s.steps[:8], torch.zeros_like(s.steps), problem(16, 33, 0.2, False)[0].steps):
        with pytest.raises(KernelError, match="prepare"):
            sparse_linear(x, y, s._replace(steps=steps.contiguous()))


def test_results_do_not_depend_on_threads() -> None:
    s, _ = problem(300, 200, 0.5, True)
    x, threads = torch.randn(20, 200), torch.get_num_threads()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(torch.zeros(20, 300))
        sparse_linear(x, found[-1], s)
    torch.set_num_threads(threads)
    assert np.array_equal(*found)


@pytest.mark.parametrize("exceptions", ["raw_fp16", "uint2-channel", "int4-tensor"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_packed_layer_with_exceptions(exceptions: str, tokens: int) -> None:
    w = torch.randn(48, 256)
    fmt = exceptions if exceptions.startswith("raw") else Format.parse(exceptions)
    qt = split_quantize(w, w.abs() > 2, Format.parse("uint2-g64"), fmt, codec="gap")
    layer = PackedLinear.from_quantized(qt)
    x = torch.randn(tokens, 256, requires_grad=True)
    want = x @ qt.dequantize().T
    assert torch.allclose(layer(x), want, atol=2e-4)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, qt.dequantize().sum(0).expand_as(x), atol=2e-4)
    layer.activations = "int8"
    with torch.no_grad():
        assert float((layer(x) - want).norm() / want.norm()) < 0.02


def test_the_self_check_refuses_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    isa, run = kernels.active_isa(), module.sparse_linear
    if isa == "scalar":
        pytest.skip("the scalar row is what the others are checked against")

    def wrong(x: torch.Tensor, y: torch.Tensor, s: Sparse, row: "str | None" = None) -> None:
        run(x, y, s, row)
        y[-1, -1] += 1e-3 if row == isa and len(x) == 9 else 0

    monkeypatch.setattr(module, "sparse_linear", wrong)
    module._agrees.cache_clear()
    try:
        with pytest.raises(KernelError, match=f"sparse_linear/{isa}.*refused"):
            module.checked_isa()
    finally:
        module._agrees.cache_clear()


def test_doctor_lists_the_rows_and_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [r for r in kernels.rows() if r["op"] == "sparse_linear"]
    assert [r["isa"] for r in listed if r["selfcheck"] == "ok"] == ROWS
    assert [r["isa"] for r in listed if r["active"]] == [kernels.isa_of("sparse_linear")]
    right = module.sparse_linear

    def wrong(x: torch.Tensor, y: torch.Tensor, s: Sparse, isa: "str | None" = None) -> None:
        right(x, y, s, isa)
        if isa == ROWS[0]:
            y[0, 0] += 1

    if ROWS[0] != "scalar":
        monkeypatch.setattr(module, "sparse_linear", wrong)
        module._agrees.cache_clear()
        assert [r["selfcheck"] for r in module.rows() if r["isa"] == ROWS[0]] == ["failed"]
        module._agrees.cache_clear()


@pytest.mark.parametrize("integer", [False, True])
def test_what_a_product_reads_is_less_than_what_is_kept(integer: bool) -> None:
    s, _ = problem(256, 512, 0.05, integer)
    few, many, places = s.read_bytes(1), s.read_bytes(8), len(s.column)
    least = (2 if integer else 5) * places
    assert few == s.read_bytes(7) and least < few < 3 * least and least < many < 2 * least
    assert few + many <= s.steps.nbytes < few + many + 8192
