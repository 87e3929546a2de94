"""LayerNorm without weights, then x·(1 + scale) + shift (DiT, arXiv 2212.09748, §3.2).

B batch · N tokens · D width; shift and scale are [B, 1, D], or [B, N, D] where tokens have their own
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stack.nn.kernels import runs_fused

EPS = 1e-6


def modulated_norm(x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """All of one dtype."""
    if runs_fused(x_BND):
        from stack.nn.kernels.fused import ModulatedNorm

        return ModulatedNorm.apply(x_BND, shift, scale, EPS)
    return torch.addcmul(shift, F.layer_norm(x_BND, x_BND.shape[-1:], eps=EPS), 1 + scale)
