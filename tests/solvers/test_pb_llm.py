"""PB-LLM: all salient is 8-bit GPTQ, none is binarized GPTQ."""

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.solvers import find
from lowbit.solvers.pb_llm import solve
from lowbit.statistics import LayerStatistics, output_error

PLAIN = {"damping": 0.01, "weighted": False, "refit": False, "sweeps": 0}


def problem(out: int = 32, in_: int = 64) -> tuple[torch.Tensor, LayerStatistics]:
    x = torch.randn(400, in_) @ (torch.eye(in_) + 0.3 * torch.randn(in_, in_) / in_**0.5)
    return torch.distributions.StudentT(4.0).sample((out, in_)), LayerStatistics(x.T @ x / len(x), x.abs().mean(0), 400)


@pytest.mark.parametrize(("salient", "text"), [(0.0, "binary-channel-zreal"), (1.0, "uint8-channel")])
def test_its_ends_are_gptq(salient, text):
    w, stats = problem()
    found = solve(w, stats, Format.parse("binary-channel-zreal"), salient=salient).w_hat()
    gptq = find("gptq").solve(w, stats, Format.parse(text), **{**find("gptq").options, **PLAIN}).w_hat()
    assert torch.equal(found, gptq)


def test_the_error_falls_steeply_with_the_first_salient_weights_and_bits_are_counted():
    torch.manual_seed(0)
    w, stats = problem(64, 256)
    fmt = Format.parse("binary-channel-zreal")
    errors, bits = [], []
    for salient in (0.0, 0.05, 0.1, 0.2):
        solution = solve(w, stats, fmt, salient=salient)
        errors.append(output_error(w, solution.w_hat(), stats.gram))
        bits.append(solution.quantized().bits_per_weight)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] - errors[2] > 1.5 * (errors[2] - errors[3])
    assert bits[0] == 1 + 32 / 256
    index = bits[2] - (1 + 0.1 * 8 + 32 / 256 + 24 / 256)
    assert 0.469 < index + 1e-3 < 0.62  # the entropy of one place in ten, and what gap codes add


def test_salient_weights_are_those_that_cost_most_to_lose():
    w, stats = problem()
    w[5, 7] = 40.0
    gram = stats.gram.clone()
    gram[9] = gram[:, 9] = 0  # a dead input: nothing in it is salient
    dead = LayerStatistics(gram, stats.abs_mean, 400)
    solution = solve(w, dead, Format.parse("binary-channel-zreal"), salient=0.01)
    mask = solution.exceptions[0].mask
    assert mask.sum() == round(0.01 * w.numel()) and mask[5, 7]
    assert solution.notes["dead"] == 1


def test_other_formats_are_refused():
    with pytest.raises(FormatError, match="binarizes"):
        solve(*problem(), Format.parse("int2-channel"))
