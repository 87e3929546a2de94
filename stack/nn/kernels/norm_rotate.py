"""QK-RMSNorm (arXiv 2302.05442, §2), then the rotary embedding: what queries and keys go through before attention.

B batch · S tokens · A heads · E head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stack.nn.kernels import runs_fused
from stack.nn.rope import Rotation, rotate

EPS = 1e-6


def norm_rotate(x_BSAE: Tensor, weight_E: Tensor, rotation: Rotation | None) -> Tensor:
    """x / rms(x) · weight of each head, then its channel pairs turned by the angles of its token, if there are any.

    Computed in float32 or wider.
    """
    if runs_fused(x_BSAE):
        from stack.nn.kernels.fused import NormRotate

        return NormRotate.apply(x_BSAE, weight_E, *(rotation or (None, None)), EPS)
    wide = torch.promote_types(x_BSAE.dtype, torch.float32)
    normed = F.rms_norm(x_BSAE.to(wide), weight_E.shape, weight_E.to(wide), EPS)
    return (normed if rotation is None else rotate(normed, rotation)).to(x_BSAE.dtype)
