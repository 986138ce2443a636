"""The rows of the method table and the protocols they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit.bench import stacked, stacked_levels
from lowbit.bench.stacked import Method


@dataclass(frozen=True)
class Row:
    """bits: nominal, of the weights; activations and block: see `lowbit.train.networks`."""

    name: str
    bits: float
    make: Callable[[], Method]
    activations: str = "float"
    block: str = "pair"


@dataclass(frozen=True)
class Protocol:
    """One way to train for every row: SGD with momentum, warm-up, cosine to 0, random crops and flips.

    train_images, test_images: 0 for all
    """

    name: str
    depth: int = 20
    width: int = 16
    stem_stride: int = 1
    epochs: int = 200
    batch: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    warmup: float = 5.0
    train_images: int = 0
    test_images: int = 0

    @property
    def network(self) -> dict[str, Any]:
        return {"depth": self.depth, "width": self.width, "stem_stride": self.stem_stride}


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("resnet20"),
        Protocol("small", depth=8, width=16, stem_stride=2, epochs=12, batch=128, warmup=1.0),
    )
}

LOW_VARIANCE = 1e-3  # DenseShift's other initialisation: latents so near to 0 that they flip at once

ROWS = {
    row.name: row
    for row in (
        Row("fp32", 32, stacked.Float),
        Row("w1-ste", 1, stacked.Ste),
        Row("w1-bnn+", 1, stacked.BnnPlus),
        Row("w1-reste", 1, stacked.Reste),
        Row("w1-biper", 1, stacked.BiPer),
        Row("w1-irnet", 1, stacked.IrNet),
        Row("w1-proxconnect", 1, stacked.ProxConnect),
        Row("w1-bnn++", 1, stacked.BnnPlusPlus),
        Row("w1-parq", 1, stacked.Parq),
        Row("ternary-twn", 1.6, stacked.Twn),
        Row("ternary-bitnet-mean", 1.6, stacked.BitNet),
        Row("ternary-bitnet-median", 1.6, lambda: stacked.BitNet("median")),
        Row("ternary-s3", 1.6, lambda: stacked_levels.S3(2)),
        Row("ternary-proxconnect", 1.6, lambda: stacked.ProxConnect(3)),
        Row("ternary-parq", 1.6, lambda: stacked.Parq(3)),
        Row("w2-denseshift", 2, lambda: stacked_levels.DenseShift(2)),
        Row("w3-denseshift", 3, lambda: stacked_levels.DenseShift(3)),
        Row("w4-denseshift", 4, lambda: stacked_levels.DenseShift(4)),
        Row("w2-denseshift-low", 2, lambda: stacked_levels.DenseShift(2, LOW_VARIANCE)),
        Row("w3-denseshift-low", 3, lambda: stacked_levels.DenseShift(3, LOW_VARIANCE)),
        Row("w4-denseshift-low", 4, lambda: stacked_levels.DenseShift(4, LOW_VARIANCE)),
        Row("w3-s3", 3, lambda: stacked_levels.S3(3)),
        Row("w2-deepshift-q", 2, lambda: stacked_levels.DeepShiftQ(2)),
        Row("w3-deepshift-q", 3, lambda: stacked_levels.DeepShiftQ(3)),
        Row("w4-deepshift-q", 4, lambda: stacked_levels.DeepShiftQ(4)),
        Row("w2-shift-lsq", 2, lambda: stacked_levels.LsqShift(2)),
        Row("w3-shift-lsq", 3, lambda: stacked_levels.LsqShift(3)),
        Row("w4-shift-lsq", 4, lambda: stacked_levels.LsqShift(4)),
        Row("w2-shift-parq", 2, lambda: stacked_levels.ParqShift(2)),
        Row("w3-shift-parq", 3, lambda: stacked_levels.ParqShift(3)),
        Row("w4-shift-parq", 4, lambda: stacked_levels.ParqShift(4)),
        Row("w2-lsq", 2, lambda: stacked_levels.Lsq(2)),
        Row("w3-lsq", 3, lambda: stacked_levels.Lsq(3)),
        Row("w4-lsq", 4, lambda: stacked_levels.Lsq(4)),
        Row("w1a1-bnn", 1, stacked.Ste, "sign"),
        Row("w1a1-bireal", 1, stacked.Ste, "approx", "single"),
        Row("w1a1-reactnet", 1, stacked.Ste, "rsign", "single"),
        Row("w1a1-reactnet-2stage", 1, stacked.TwoStage, "rsign", "single"),
        Row("w1a1-reactnet-parq", 1, stacked.Parq, "rsign", "single"),
        Row("w1a1-reste", 1, stacked.Reste, "reste", "single"),
    )
}
