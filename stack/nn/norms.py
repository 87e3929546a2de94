"""QK-normalisation.

B batch · S tokens · A heads · E head size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stack.nn.kernels.norm_rotate import norm_rotate
from stack.nn.rope import Rotation


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension; the rotary embedding with it, where there is one."""

    no_decay = ("weight",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BSAE: Tensor, rotation: Rotation | None = None) -> Tensor:
        return norm_rotate(x_BSAE, self.weight, rotation)
