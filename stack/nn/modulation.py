"""Adaptive LayerNorm (DiT, arXiv 2212.09748, §3.2): a vector per sample scales, shifts and gates its tokens.

B batch · N tokens · D width
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from stack.nn.linear import Linear


class ShiftScale(NamedTuple):
    shift_B1D: Tensor
    scale_B1D: Tensor


class ShiftScaleGate(NamedTuple):
    shift_B1D: Tensor
    scale_B1D: Tensor
    gate_B1D: Tensor


class AdaLN(nn.Module):
    """SiLU, then a linear layer D → 2·D: the modulation of tokens that no residual follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 2 * width)

    def forward(self, vec_BD: Tensor) -> ShiftScale:
        return ShiftScale(*self.linear(F.silu(vec_BD))[:, None].chunk(2, dim=-1))


class Modulation(nn.Module):
    """SiLU, then a linear layer D → 6·D: the modulation of attention and, after it, of the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 6 * width)

    def forward(self, vec_BD: Tensor) -> tuple[ShiftScaleGate, ShiftScaleGate]:
        vectors = self.linear(F.silu(vec_BD))[:, None].chunk(6, dim=-1)
        return ShiftScaleGate(*vectors[:3]), ShiftScaleGate(*vectors[3:])


def modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """x·(1 + scale) + shift."""
    return x_BND * (1 + scale_B1D) + shift_B1D
