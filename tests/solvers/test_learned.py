"""Learned rounding on a block of two layers whose best codes can be found by trying all of them."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, decode, encode, fit
from lowbit.solvers import find, learned
from lowbit.solvers._spec import Solution

FORMAT = Format.parse("uint2-g8")


def rtn(w: Tensor, fmt: Format = FORMAT) -> Solution:
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    return Solution(fmt.blocks.merge(encode(blocks, grid, fmt), *w.shape), grid, fmt, {"damping": 0.1})


def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return x + torch.tanh(x @ weights["a"].T) @ weights["b"].T


def block(seed: int = 0, windows: int = 6) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    w = {"a": torch.randn(16, 8, generator=g), "b": torch.randn(8, 16, generator=g)}
    mix = torch.eye(8) + torch.randn(8, 8, generator=g) / 2
    inputs = [torch.randn(1, 32, 8, generator=g) @ mix for _ in range(windows)]
    return w, inputs, [forward(w, x) for x in inputs]


def loss(weights: dict[str, Tensor], inputs: list[Tensor], targets: list[Tensor]) -> float:
    return learned._mean_loss(weights, forward, list(zip(inputs, targets)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_block_comes_nearer_to_the_float_block(seed: int) -> None:
    w, inputs, targets = block(seed)
    starts = {n: (rtn(m), m) for n, m in w.items()}
    found = learned.tune(starts, forward, inputs, targets, steps=40, batch=2, lr=0.03, lr_scale=0.004)
    before = loss({n: s.w_hat() for n, (s, _) in starts.items()}, inputs, targets)
    after = loss({n: s.w_hat() for n, s in found.items()}, inputs, targets)
    assert after < 0.8 * before
    assert found["a"].notes["block_loss"] == pytest.approx([before, after])
    assert found["a"].notes["damping"] == 0.1
    assert any(not torch.equal(found[n].codes, starts[n][0].codes) for n in w)
    for n in w:  # a solution can be stored: codes of two bits, scales as fp16 keeps them
        assert found[n].codes.max() <= 3
        assert torch.equal(found[n].grid.scale, found[n].grid.scale.half().float())


def test_steps_that_only_do_harm_are_taken_back() -> None:
    w, inputs, targets = block()
    starts = {n: (rtn(m), m) for n, m in w.items()}
    found = learned.tune(starts, forward, inputs, targets, steps=1, batch=1, lr=50.0, lr_scale=50.0)
    for n in w:
        assert torch.equal(found[n].codes, starts[n][0].codes)
        assert torch.equal(found[n].grid.scale, starts[n][0].grid.scale)


def test_codes_alone_find_the_best_rounding_of_a_row() -> None:
    """Eight weights: all 2^8 ways to round up or down are tried."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(1, 8, generator=g)
    inputs = [torch.randn(1, 64, 8, generator=g) @ (torch.eye(8) + torch.randn(8, 8, generator=g))]

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ weights["a"].T + 3

    targets = [one({"a": w}, x) for x in inputs]
    start = rtn(w, Format.parse("uint4-g8"))
    grid, fmt = start.grid, start.format
    down = (w / grid.scale + grid.zero).floor().clamp(0, 14)

    def error(codes: Tensor) -> float:
        return learned._mean_loss({"a": decode(codes, grid, fmt)}, one, list(zip(inputs, targets)))

    best = min(error((down + torch.tensor([up])).to(torch.uint8)) for up in product((0.0, 1.0), repeat=8))
    found = learned.tune({"a": (start, w)}, one, inputs, targets, steps=200, batch=1, lr=0.1, lr_scale=0.0)["a"]
    assert error(found.codes) <= 1.5 * best < error(start.codes)


def test_layers_it_cannot_learn_stay_as_they_are() -> None:
    w, inputs, targets = block()
    starts = {"a": (rtn(w["a"]), w["a"]), "b": (rtn(w["b"], Format.parse("nf4-g8")), w["b"])}
    found = learned.tune(starts, forward, inputs, targets, steps=20, lr=0.03)
    assert set(found) == {"a"}


def test_the_same_seed_gives_the_same_codes() -> None:
    w, inputs, targets = block()
    runs = [
        learned.tune(
            {n: (rtn(m), m) for n, m in w.items()}, forward, inputs, targets, steps=8, batch=2, lr=0.03, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0]["a"].codes, runs[1]["a"].codes)
    assert torch.equal(runs[0]["a"].grid.scale, runs[1]["a"].grid.scale)
    assert not torch.equal(runs[0]["a"].grid.scale, runs[2]["a"].grid.scale)


def test_rounding_passes_gradients_inside_the_range_only() -> None:
    codes = torch.tensor([-1.0, -0.4, 0.3, 2.6, 3.4, 3.6], requires_grad=True)
    rounded = learned._Round.apply(codes, 0, 3)
    assert rounded.tolist() == [0, 0, 0, 3, 3, 3]
    rounded.sum().backward()
    assert codes.grad is not None and codes.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_the_start_is_gptq() -> None:
    assert find("learned").solve is learned.solve
    assert set(learned.OWN).isdisjoint(find("gptq").options)
