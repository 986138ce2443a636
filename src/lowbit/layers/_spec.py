"""The row a layer adds to the table of methods, and how a layer says that it stays in float."""

from dataclasses import dataclass

from torch import nn

FLOAT_MARK = "lowbit_float"


@dataclass(frozen=True)
class LayerSpec:
    """One row: a layer, or a change to a network, that papers add."""

    name: str
    title: str
    source: str
    kind: str = "layer"


def keep_float(module: nn.Module) -> nn.Module:
    """Mark a layer (and what is inside): `lowbit.prepare` leaves it alone unless `layers` names it. Returns it."""
    for m in module.modules():
        setattr(m, FLOAT_MARK, True)
    return module
