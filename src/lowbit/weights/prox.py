"""ProxConnect as a weight function: soft levels that harden while training goes on; the gradient passes unchanged.

    training     w_hat = s prox_t(w / s)       t by a schedule: free until `start`, hard from `stop` on
    evaluation   w_hat = s nearest(w / s)      what will be packed, at any time
    dL/dw = dL/dw_hat

map: "parq" (piecewise affine), "relax" (BinaryRelax), "hard" (BinaryConnect). The scale s is the format's, fitted in
every forward pass (the paper's code: every 10 steps). Call lowbit.step. For the same as an optimizer, on a network that
is left as it is, see lowbit.ProxConnect.

Source: Dockhorn et al. 2021 (arXiv:2110.13220); Jin et al. 2025, PARQ (arXiv:2503.15748).
"""

from typing import Any

from torch import Tensor

from lowbit.errors import FormatError, RecipeError, near_names
from lowbit.estimators._proximal import MAPS, schedule
from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize


class Prox(Quantize):
    """start, stop: positions in the training between which the map hardens."""

    def __init__(self, w: Tensor, format: Any, map: str, start: float, stop: float):
        if map not in MAPS:
            raise RecipeError(f"unknown proximal map {map!r}. {near_names(str(map), list(MAPS))}")
        if not 0 <= start < stop <= 1:
            raise RecipeError(f"start={start}, stop={stop}: positions in the training, 0 <= start < stop <= 1.")
        super().__init__(format, "identity", w=w)
        if not self._is_plain():
            raise FormatError(f"{self.format}: proximal maps take levels times one scale a block, without a zero.")
        move = schedule(map, start, stop)
        if move is not None:
            self.follow(move)
        self.map, self.soft = map, True

    def _level(self, blocks: Tensor, scale: Tensor, hard: bool, x: "Tensor | None" = None) -> Tensor:
        if hard or x is None:
            return super()._level(blocks, scale, True, x)
        return MAPS[self.map](x, self.t, self.format.levels)


def build(w: Tensor, **options: Any) -> Prox:
    return Prox(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"format": "binary-channel", "map": "parq", "start": 0.0, "stop": 0.75}
SPEC = WeightSpec("prox", "proximal maps on an annealed schedule", "arXiv:2110.13220", build, OPTIONS)
