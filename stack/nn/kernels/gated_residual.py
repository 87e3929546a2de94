"""x + gate·y: how a branch joins its stream.

B batch · N tokens · D width; gate is [B, 1, D], or [B, N, D] where tokens have their own
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual(x_BND: Tensor, gate: Tensor, y_BND: Tensor) -> Tensor:
    return torch.addcmul(x_BND, gate, y_BND)
