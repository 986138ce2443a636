"""Output-adaptive statistics against their definitions."""

import pytest
import torch

from lowbit.formats import Format
from lowbit.solvers import find
from lowbit.statistics import LayerStatistics, OutputAccumulator


def gathered(kind: str, windows: int = 3, tokens: int = 5):
    sums = OutputAccumulator(kind)
    xs = [torch.randn(1, tokens, 4) for _ in range(windows)]
    rs = [torch.randn(1, tokens, 6) for _ in range(windows)]
    for x, r in zip(xs, rs):
        sums.add(x, r)
    return sums.finish(), xs, rs


def test_oac_is_the_mean_over_windows_of_the_gradients_products_and_fisher_its_squares():
    for kind in ("oac", "fisher"):
        found, xs, rs = gathered(kind)
        g = [torch.einsum("to,ti->oi", r[0], x[0]) for x, r in zip(xs, rs)]  # torch's own weight gradient
        want = [torch.einsum("oi,oj->ij", a, a) if kind == "oac" else a * a for a in g]
        assert torch.allclose(found, sum(want) / 3, rtol=1e-5, atol=1e-6)


def test_guided_weights_are_the_mean_square_of_a_tokens_gradients():
    found, _, rs = gathered("guided")
    want = torch.stack([r[0].square().mean(1) for r in rs])
    assert found.shape == (3, 5) and torch.allclose(found, want / want.mean())


@pytest.mark.slow
def test_of_independent_gradients_oac_is_the_plain_gram_times_the_outputs():
    """The card's check: 0.6% at 4000 samples."""
    torch.manual_seed(0)
    x, out, sums = torch.randn(8, 3), 40, OutputAccumulator("oac")
    for _ in range(4000):
        sums.add(x, torch.randn(8, out))
    plain = out * x.T @ x
    assert (sums.finish() - plain).norm() < 0.02 * plain.norm()


def test_the_rank_is_at_most_windows_times_outputs_and_the_loss_scale_leaves_the_codes():
    torch.manual_seed(1)
    sums = OutputAccumulator("oac")
    sums.add(torch.randn(50, 32), torch.randn(50, 4))
    sums.add(torch.randn(50, 32), torch.randn(50, 4))
    h = sums.finish()
    assert int(torch.linalg.matrix_rank(h)) <= 8
    w, fmt = torch.randn(4, 32), Format.parse("uint3-g16-search")
    codes = [
        find("gptq").solve(w, LayerStatistics(h * c, h.diagonal().sqrt(), 100), fmt, damping=0.1).w_hat()
        for c in (1.0, 2.0**-20)
    ]
    assert torch.allclose(codes[0], codes[1], atol=1e-6)


def test_kinds_without_gradients_are_refused():
    with pytest.raises(ValueError, match="inputs"):
        OutputAccumulator("inputs")
