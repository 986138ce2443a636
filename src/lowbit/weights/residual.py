"""Two-base binary: the sign, and the sign of what it leaves.

    b_1 = sgn(w),  r = w - s_1 b_1,  b_2 = sgn(r)          w_hat = s_1 b_1 + s_2 b_2: four values a row
    both signs pass the gradient where their argument is in [-1, 1], so that
    ds_1 gets b_1 (1 - s_2 1[|r| <= 1]),  ds_2 gets b_2,
    dw gets s_1 1[|w| <= 1] + s_2 1[|r| <= 1] (1 - s_1 1[|w| <= 1])

s_1, s_2 a row, learned, started at mean|w| and mean|r|; on N(0, 1) the squared error falls from 0.363 to 0.131. The
file keeps two bits a weight and a table of four fp16 values a row. Source: Zheng et al. 2024, BinaryDM
(arXiv:2404.05662).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.estimators import through
from lowbit.formats import Format, Grid
from lowbit.weights._function import WeightFunction, WeightSpec, as_matrix

TINY = torch.finfo(torch.float32).tiny


class Residual(WeightFunction):
    """learned: train the two scales; else both are the means of the present weights, constants in the backward pass."""

    def __init__(self, w: Tensor, learned: bool):
        super().__init__()
        self.format = Format.parse("kmeans2-channel")
        self.learned = learned
        if learned:
            self.scales = nn.Parameter(_greedy(as_matrix(w.detach())))

    def forward(self, latent: Tensor) -> Tensor:
        rows = as_matrix(latent)
        scales = self.scales.float() if self.learned else _greedy(rows.detach())
        s1, s2 = scales[:, :1], scales[:, 1:]
        b1 = through(rows, _sign(rows), _window(rows))
        r = rows - s1 * b1
        b2 = through(r, _sign(r), _window(r))
        y = s1 * b1 + s2 * b2
        with torch.no_grad():
            codes, table = self._coded(rows, scales)
            values = table.gather(1, codes.long())
        return through(y, values).reshape(latent.shape).to(latent.dtype)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        rows = as_matrix(latent)
        codes, table = self._coded(rows, self.scales.detach().float() if self.learned else _greedy(rows))
        return codes, Grid(torch.ones(len(rows), 1, device=rows.device), None, table), self.format

    @staticmethod
    def _coded(rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes 2 [b_1 > 0] + [b_2 > 0], put in the order of each row's sorted table of four values in fp16."""
        s1, s2 = scales[:, :1], scales[:, 1:]
        b1 = _sign(rows)
        b2 = _sign(rows - s1 * b1)
        values = torch.cat([-s1 - s2, -s1 + s2, s1 - s2, s1 + s2], 1).half().float()
        table, order = values.sort(1)
        rank = order.argsort(1)
        code = ((b1 > 0) * 2 + (b2 > 0)).long()
        return rank.gather(1, code).to(torch.uint8), table


def _greedy(rows: Tensor) -> Tensor:
    """(out, 2): mean|w| and mean|w - mean|w| sgn(w)|."""
    first = rows.abs().mean(1, keepdim=True)
    return torch.cat([first, (rows.abs() - first).abs().mean(1, keepdim=True)], 1)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.detach() > -TINY, 1.0, -1.0)


def _window(x: Tensor) -> Tensor:
    return (x.detach().abs() <= 1).to(x.dtype)


def build(w: Tensor, **options: Any) -> Residual:
    return Residual(w, **OPTIONS | options)


OPTIONS = {"learned": True}
SPEC = WeightSpec("residual", "sum of two sign bases", "arXiv:2404.05662", build, OPTIONS)
