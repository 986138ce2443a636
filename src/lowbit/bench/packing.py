"""From the levels and scales of a trained row to packed layers, and what those are worth."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bench.rows import Protocol, Row
from lowbit.bench.trainee import new_network
from lowbit.formats import Format, Grid, QuantizedTensor
from lowbit.runtime import swap
from lowbit.runtime.fold import fold_norms
from lowbit.train.device_images import DeviceImages
from lowbit.train.networks import SignActivation
from lowbit.training import summary


def measure(row: Row, protocol: Protocol, weights: Path, data: DeviceImages) -> dict[str, Any]:
    """Bits counted, bytes, accuracy, and the share of test images that get the class the float weights give."""
    fmt, tensors = _read(weights)
    trained = float_network(row, protocol, tensors)
    packed = trained if fmt == "float" else packed_network(row, protocol, tensors, Format.parse(fmt))
    same = right = 0
    with torch.no_grad():
        for x, y in data.test_batches():
            classes = packed(x).argmax(1)
            same += int((classes == trained(x).argmax(1)).sum())
            right += int((classes == y).sum())
    size, n = summary(packed), len(data.y_test)
    bits = 32.0 if size.bits_per_weight is None else size.bits_per_weight
    return {
        "format": fmt,
        "bits_per_weight": bits,
        "bits_per_weight_file": size.bits_per_weight_file,
        "bytes": size.bytes,
        "accuracy": right / n,
        "same_class": same / n,
    }


def read_float_network(row: Row, protocol: Protocol, weights: Path) -> nn.Module:
    """The network of a weights file, in eval mode."""
    return float_network(row, protocol, _read(weights)[1])


def _read(weights: Path) -> tuple[str, dict[str, Tensor]]:
    """(format, tensors) of a file that a finished training left."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        return str((file.metadata() or {})["format"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def float_network(row: Row, protocol: Protocol, tensors: dict[str, Tensor]) -> nn.Module:
    """The network with levels * scale as float weights, in eval mode."""
    state = {n: t for n, t in tensors.items() if not n.endswith((".levels", ".scale"))}
    for name in _layers(tensors):
        scale = tensors[f"{name}.scale"].reshape(-1, 1, 1, 1)
        state[f"{name}.weight"] = tensors[f"{name}.levels"].float() * scale
    net = new_network(row, protocol)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(state[name])
    return net.eval()


def packed_network(row: Row, protocol: Protocol, tensors: dict[str, Tensor], fmt: Format) -> nn.Module:
    """The same network with packed convolutions; behind a sign they are bits times bits, batch-norms folded in."""
    net = float_network(row, protocol, tensors)
    for name in _layers(tensors):
        levels, scale = tensors[f"{name}.levels"], tensors[f"{name}.scale"].reshape(-1, 1)
        codes = torch.searchsorted(fmt.levels.table(), levels.flatten(1).float()).to(torch.uint8)
        qt = QuantizedTensor.from_codes(codes, Grid(scale), fmt, tuple(levels.shape))
        owner, _, leaf = name.rpartition(".")
        unit, old = net.get_submodule(owner), net.get_submodule(name)
        sign = getattr(unit, "sign", None)
        if isinstance(sign, SignActivation) and swap.fits_binary(old, qt):
            setattr(unit, leaf, swap.pack_binary(old, qt, "sign", 0.0 if sign.shift is None else -sign.shift.detach()))
            unit.sign = nn.Identity()
        else:
            setattr(unit, leaf, swap.pack_layer(old, qt, "conv2d", "float", swap.conv_options(old)))
    fold_norms(net)
    return net


def _layers(tensors: dict[str, Tensor]) -> list[str]:
    return [n.removesuffix(".levels") for n in tensors if n.endswith(".levels")]
