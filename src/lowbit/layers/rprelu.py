"""RPReLU: a PReLU that learns where its kink is and where it sits.

    y = PReLU(x + m_1) + m_2          m_1, m_2 and the slope a channel; started at 0, 0 and 0.25

The same parameters' cost at inference is elementwise float work, which dominates at small channel counts. Its partner
RSign is activations="sign". Source: Liu et al. 2020, ReActNet (arXiv:2003.03488).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.layers._spec import LayerSpec


class RPReLU(nn.Module):
    """x (batch, channels, ...) -> the same shape."""

    def __init__(self, channels: int, slope: float = 0.25):
        super().__init__()
        self.before, self.after = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return F.prelu(x + self.before.reshape(shape), self.slope) + self.after.reshape(shape)


SPEC = LayerSpec("rprelu", "PReLU with learned shifts", "arXiv:2003.03488")
