"""resnet: the residual networks of `lowbit.train.networks`, as deep and wide as asked.

activations: "float" (ReLU), or "signed" and "signed_rprelu" for networks whose inputs `prepare` turns into signs.
"""

from typing import Any

from torch import nn

from lowbit.train.architectures._spec import ArchitectureSpec
from lowbit.train.networks import BLOCKS, resnet


def build(kind: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    if options["block"] not in BLOCKS:
        raise ValueError(f"block {options['block']!r} is none of {', '.join(BLOCKS)}.")
    if options["activations"] not in ("float", "signed", "signed_rprelu"):
        raise ValueError(f"activations {options['activations']!r} are none of float, signed, signed_rprelu.")
    return resnet(**options, classes=classes, channels=shape[0])


OPTIONS = {"depth": 20, "width": 16, "activations": "float", "block": "pair", "stem_stride": 1}
SPEC = ArchitectureSpec("resnet", "residual convolutions", "arXiv:1512.03385", ("images",), build, OPTIONS)
