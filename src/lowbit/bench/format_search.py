"""Float formats beside integers: does a menu with both give a better network at equal bytes?

    python -m lowbit.bench.format_search resnet20.safetensors --data cifar10/ --bits 4 3

Each convolution of a residual network but the first (see `lowbit.bench.resnet`) takes a format of the menu for its
weights, rounded to the nearest. The budget is what the integers of so many bits take everywhere. Two ways to choose:
an integer program on the KL that each layer causes alone, and FLIQS, policy-gradient search on the KL of the whole
network (Dotzel 2023, arXiv:2308.03290; there weights are trained meanwhile). Both look at training images; what is
shown is the KL to the float network's predictions, and the accuracy, on test images.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.allocate import Probe, Problem, find, storage_bytes
from lowbit.allocate.kl import divergence
from lowbit.bench.resnet import load_resnet, normalized
from lowbit.errors import LowbitError
from lowbit.formats import Format, quantize
from lowbit.train.images import read_images
from lowbit.train.networks import quantized_names

INTEGERS = tuple(f"int{b}-channel-search" for b in (2, 3, 4, 5, 6, 8))
FLOATS = tuple(f"{name}-channel-search" for name in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3"))
MENUS = {"integers": INTEGERS, "integers and floats": INTEGERS + FLOATS}
HEADER = (
    "| bytes of | menu | chosen by | bytes | KL, test | accuracy | weights in floats |\n|---|---|---|---|---|---|---|"
)


def probe_of(net: nn.Module, x: Tensor) -> Probe:
    """The network with every format of both menus; its loss is the KL to its own float predictions on x."""
    weights: dict[str, Any] = {n: net.get_submodule(n).weight for n in quantized_names(net)}
    before = {n: w.detach().clone() for n, w in weights.items()}
    with torch.no_grad():
        reference = net(x).log_softmax(-1)

    @cache
    def rounded(name: str, label: str) -> Tensor:
        w = before[name]
        return quantize(w.flatten(1), Format.parse(label)).dequantize().reshape(w.shape)

    def loss() -> Tensor:
        return torch.tensor(divergence(reference, net(x)))

    return Probe(weights, INTEGERS + FLOATS, rounded, loss, lambda: net(x))


def problem_of(probe: Probe, loss: Any, menu: tuple[str, ...], bits: int) -> Problem:
    """Least loss within the bytes of int`bits` everywhere. loss: (items, all formats)"""
    size = probe.table(lambda n, label, w: storage_bytes((w.shape[0], w[0].numel()), label))
    kept = [probe.menu.index(label) for label in menu]
    limit = float(size[:, probe.menu.index(f"int{bits}-channel-search")].sum())
    return Problem(probe.names, menu, {"loss": loss[:, kept], "bytes": size[:, kept]}, {"bytes": limit})


def rows(probe: Probe, few: Probe, bits: int, steps: int, loss: Any) -> "list[tuple[str, str, Any, float]]":
    """(menu, way, choice of formats by label, bytes); few: the probe that the search measures on"""
    found = []
    for menu, labels in MENUS.items():
        problem = problem_of(probe, loss, labels, bits)
        at = np.array([probe.menu.index(label) for label in labels])
        uniform = np.full(len(probe.names), labels.index(f"int{bits}-channel-search"))
        ways = [("one format for all", problem.allocation(uniform))] if menu == "integers" else []
        ways.append(("integer program", find("integer_program").run(problem)))
        searched = find("policy_gradient").run(problem, lambda c, at=at: few.measure(at[c]), steps=steps)
        for way, a in (*ways, ("FLIQS", searched)):
            found.append((menu, way, at[a.choice], a.totals["bytes"]))
    return found


@torch.no_grad()
def measured(net: nn.Module, probe: Probe, choice: Any, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(KL, accuracy, share of weights in float formats) of a choice, on test images."""
    reference = torch.cat([net(part) for part in x.split(250)]).log_softmax(-1)
    with probe.placed(probe.chosen(choice)):
        logits = torch.cat([net(part) for part in x.split(250)])
    sizes = np.array([w.numel() for w in probe.weights.values()])
    floats = float(sizes[choice >= len(INTEGERS)].sum() / sizes.sum())
    return divergence(reference, logits), float((logits.argmax(1) == y).float().mean()), floats


def main(arguments: "list[str] | None" = None) -> int:
    """Entry point; prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, help="safetensors with the state dict")
    parser.add_argument("--data", required=True, help="a folder of Parquet files, or the file of lowbit.train.images")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--images", type=int, default=128, help="training images for the losses of single layers")
    parser.add_argument("--few", type=int, default=48, help="of them, those the search measures each sample on")
    parser.add_argument("--steps", type=int, default=400, help="samples of the search")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    args = parser.parse_args(arguments)
    try:
        net = load_resnet(args.net).requires_grad_(False)
        train, test = read_images(args.data)
    except (LowbitError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    x, held = normalized(train.first(args.images))[0], normalized(test.first(args.test))
    probe, few = probe_of(net, x), probe_of(net, x[: args.few])
    loss = find("kl").run(probe)
    print(HEADER, flush=True)
    for bits in args.bits:
        for menu, way, choice, size in rows(probe, few, bits, args.steps, loss):
            kl, right, floats = measured(net, probe, choice, *held)
            cells = [f"{size:.0f}", f"{kl:.4f}", f"{100 * right:.1f}", f"{100 * floats:.0f}%"]
            print(f"| int{bits} | {menu} | {way} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
