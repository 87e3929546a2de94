"""Attention behind one function, which every model calls.

B batch · A heads · S tokens · E head size
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BASE: Tensor, k_BASE: Tensor, v_BASE: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √E) v for each head, over the keys that `mask_BS` allows.

    `mask_BS` is True where a key is a real token; a sample needs at least one. The caller passes None when it knows
    that every key counts: to find that out here would wait for the device. Queries are never masked, so the rows of
    padded tokens hold values that mean nothing. Returns [B, A, S, E] for the S tokens of `q_BASE`.
    """
    mask_B11S = None if mask_BS is None else mask_BS[:, None, None, :]
    return F.scaled_dot_product_attention(q_BASE, k_BASE, v_BASE, attn_mask=mask_B11S)
