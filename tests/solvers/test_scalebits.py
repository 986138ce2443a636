"""ScaleBITS: gains are exact, the average is kept, tiles come back from the file, channels are gathered unchanged."""

import pytest
import torch

from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, QuantizedTensor
from lowbit.solvers import find
from lowbit.solvers.scalebits import WIDTHS, Tiles, choose, gains, solve
from lowbit.statistics import GramAccumulator, output_error

FMT = Format.parse("uint4-g16-search")


@pytest.fixture(scope="module")
def problem():
    """Inputs of which few matter, and those together."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 64, generator=g), torch.randn(400, 64, generator=g)
    x[:, :16] *= 6
    x = x @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=g))
    stats = GramAccumulator(64)
    stats.add(x)
    return w, stats.finish()


def test_gains_are_those_of_the_outputs(problem):
    w, stats = problem
    tiles = Tiles.of(w, FMT, stats.gram.diagonal())
    choice = torch.arange(4).reshape(1, 4) % 3
    found = gains(w, stats.gram, tiles, choice)
    before = output_error(w, tiles.weights(choice), stats.gram)
    for j in range(4):
        for o in range(len(WIDTHS)):
            other = choice.clone()
            other[0, j] = o
            fell = before - output_error(w, tiles.weights(other), stats.gram)
            assert float(found[0, j, o]) == pytest.approx(fell, rel=1e-3, abs=1e-3 * before)


@pytest.mark.parametrize("average", [2.0, 2.5, 3.25, 4.0])
def test_the_average_is_kept_and_more_bits_are_never_worse(problem, average):
    w, stats = problem
    tiles = Tiles.of(w[:32], FMT, stats.gram.diagonal())
    choice = choose(w[:32], stats.gram, tiles, average, 12)
    assert torch.tensor(WIDTHS)[choice].float().mean() <= average + 1e-6
    more = choose(w[:32], stats.gram, tiles, min(average + 0.5, 4.0), 12)
    assert output_error(w[:32], tiles.weights(more), stats.gram) <= output_error(
        w[:32], tiles.weights(choice), stats.gram
    ) * (1 + 1e-6)


def test_one_width_for_all_is_gptq(problem):
    w, stats = problem
    uniform = find("gptq").solve(w, stats, Format.parse("uint4-g16-search"))
    torch.testing.assert_close(solve(w, stats, FMT, average=4.0).w_hat(), uniform.w_hat())


def test_tiles_beat_one_width_and_come_back_from_the_file(problem):
    small, stats = problem
    w = torch.cat([8 * small, small])
    solution = solve(w, stats, FMT, average=3.0)
    q = solution.quantized()
    assert q.tiles == (64, 16) and sum(solution.notes["tiles"]) == 8
    again = QuantizedTensor.from_tensors(q.meta(), q.tensors()).dequantize()
    assert torch.equal(again, solution.w_hat())
    uniform = find("gptq").solve(w, stats, Format.parse("uint3-g16-search"))
    assert output_error(w, again, stats.gram) < output_error(w, uniform.w_hat(), stats.gram)
    plain = solve(w, stats, FMT, average=3.0, feedback=False)
    assert output_error(w, again, stats.gram) < output_error(w, plain.w_hat(), stats.gram)


def test_equal_tiles_get_equal_widths():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(64, 16, generator=g).repeat(1, 4)
    stats = GramAccumulator(64)
    stats.add(torch.eye(64))
    assert (choose(w, stats.finish().gram, Tiles.of(w, FMT, torch.ones(64)), 3.0, 4) == 1).all()


def test_what_it_needs_is_said(problem):
    with pytest.raises(RecipeError, match="scalebits needs calibration text"):
        solve(problem[0], None, FMT)
    with pytest.raises(FormatError, match="integers with a zero"):
        solve(problem[0], problem[1], Format.parse("nf4-g16"))
