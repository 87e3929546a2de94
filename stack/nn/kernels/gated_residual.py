"""x + gate·y: how a branch joins its stream.

B batch · N tokens · D width; gate is [B, 1, D], or [B, N, D] where tokens have their own
"""

from __future__ import annotations

import torch
from torch import Tensor

from stack.nn.kernels import runs_fused


def gated_residual(x_BND: Tensor, gate: Tensor, y_BND: Tensor) -> Tensor:
    """All of one dtype."""
    if runs_fused(x_BND):
        from stack.nn.kernels.fused import GatedResidual

        return GatedResidual.apply(x_BND, gate, y_BND)
    return torch.addcmul(x_BND, gate, y_BND)
