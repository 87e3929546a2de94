"""Normalisation.

D width · E head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def layer_norm(x_D: Tensor) -> Tensor:
    """LayerNorm over the last dimension without weights: adaLN supplies scale and shift."""
    return F.layer_norm(x_D, x_D.shape[-1:], eps=EPS)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32 or wider (QK-norm: arXiv 2302.05442, §2)."""

    no_decay = ("weight",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_E: Tensor) -> Tensor:
        wide = torch.promote_types(x_E.dtype, torch.float32)
        return F.rms_norm(x_E.to(wide), self.weight.shape, self.weight.to(wide), EPS).to(x_E.dtype)
