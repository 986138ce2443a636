"""Compress a trained residual network for CIFAR-10, and say what is left of its accuracy.

    python -m lowbit.bench.resnet resnet56.safetensors --data cifar10/ --method gptq --bits 4 3 2

The file holds a state dict in the layout of the usual public checkpoints (conv1, layer1.0.conv1, ..., linear), whose
inputs are normalized by ImageNet's mean and deviation. Every convolution but the first is rounded, scales for each
output channel; biases and batch norms follow (`pipeline.network`). `plain` rounds without any image, and leaves them.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LowbitError, ModelError
from lowbit.evaluate import accuracy
from lowbit.recipe import Recipe
from lowbit.runtime.safetensors_io import read_header, read_tensor
from lowbit.train.images import Images, read_images
from lowbit.train.networks import resnet
from lowbit.training import bits_per_weight

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADER = "| method | format | bits | plain | with images | s |\n|---|---|---|---|---|---|"


def load_resnet(path: Path) -> nn.Module:
    """The network of a public checkpoint, in eval mode. Raises ModelError for a file of another layout."""
    header = read_header(path)
    found = {n.removeprefix("module."): read_tensor(path, header, n) for n in header.entries}
    blocks = sum(1 for n in found if n.startswith("layer") and n.endswith(".conv1.weight"))
    net = resnet(depth=2 * blocks + 2)
    renamed = {_ours(n, blocks // 3): t for n, t in found.items()}
    try:
        net.load_state_dict(renamed, strict=False)
        missing = [n for n in net.state_dict() if n not in renamed and not n.endswith("num_batches_tracked")]
    except RuntimeError as e:
        raise ModelError(f"{path} is no residual network for CIFAR-10: {str(e).splitlines()[1].strip()}") from None
    if missing:
        raise ModelError(f"{path} is no residual network for CIFAR-10: it has no tensor for {missing[0]}.")
    return net.eval()


def _ours(name: str, each: int) -> str:
    """conv1.weight -> stem.weight, layer2.0.bn1.bias -> blocks.3.first.bn.bias, linear.bias -> head.bias"""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        return ".".join([{"conv1": "stem", "bn1": "bn", "linear": "head"}.get(parts[0], parts[0]), *parts[1:]])
    block = (int(parts[0][5:]) - 1) * each + int(parts[1])
    kind, unit = parts[2][:-1], "first" if parts[2].endswith("1") else "second"
    return ".".join(["blocks", str(block), unit, kind, *parts[3:]])


def normalized(images: Images) -> tuple[Tensor, Tensor]:
    """(x (n, 3, height, width) float32 as the checkpoints expect, classes)."""
    x = images.x.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None], images.y


def row(net: nn.Module, method: str, fmt: str, x: Tensor, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Accuracies after rounding without images (None where the method needs them) and with x."""
    plain = None
    if not Recipe(method=method, format=fmt).needs_data:
        plain = accuracy(lowbit.compress(net, method, format=fmt), *test).accuracy
    began = time.perf_counter()
    solved = lowbit.compress(net, method, format=fmt, data=x)
    seconds = time.perf_counter() - began
    found = accuracy(solved, *test).accuracy
    return {"bits": bits_per_weight(solved), "plain": plain, "accuracy": found, "seconds": seconds}


def main(arguments: "list[str] | None" = None) -> int:
    """Entry point; prints the table row by row."""
    args = _parser(__doc__).parse_args(arguments)
    try:
        net = load_resnet(args.net)
        train, test = read_images(args.data)
        x, held = normalized(train.first(args.images))[0], normalized(test.first(args.test))
    except (LowbitError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    result = accuracy(net, *held)
    print(f"{result.samples} test images, two standard errors {200 * result.stderr:.1f} points; {len(x)} inputs")
    print(f"{HEADER}\n| float | | 32 | {100 * result.accuracy:.1f} | | |", flush=True)
    for method in args.method:
        for bits in args.bits:
            fmt = args.format.format(bits=bits)
            r = row(net, method, fmt, x, held)
            plain = "" if r["plain"] is None else f"{100 * r['plain']:.1f}"
            cells = [f"{r['bits']:.3f}", plain, f"{100 * r['accuracy']:.1f}", f"{r['seconds']:.0f}"]
            print(f"| {method} | {fmt} | {' | '.join(cells)} |", flush=True)
    return 0


def _parser(text: "str | None") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, help="safetensors with the state dict")
    parser.add_argument("--data", required=True, help="a folder of Parquet files, or the file of lowbit.train.images")
    parser.add_argument("--method", nargs="+", default=["gptq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--format", default="uint{bits}-channel-search")
    parser.add_argument("--images", type=int, default=128, help="training images that calibrate")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
