"""Classifier-free guidance (arXiv 2207.12598) in one form: v_∅ + γ·(v_y − v_∅). γ = 1 is no guidance.

B batch · T text tokens of all samples · D channels of the text
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stack.text.conditioning import Context

Model = Callable[..., Tensor]
"""(latent, t, tokens, lengths, pooled) → velocity, as `stack.models.mmdit.MMDiT`."""


def guided(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
    """v_∅ + γ·(v_y − v_∅) with γ = `scale`."""
    return v_uncond + scale * (v_cond - v_uncond)


def classifier_free(
    model: Model, latent_BCHW: Tensor, t_B: Tensor, cond: Context, uncond: Context, scale: float
) -> Tensor:
    """The guided velocity, from one call of `model` on both halves; from `cond` alone at scale 1."""
    if scale == 1:
        return model(latent_BCHW, t_B, *cond)
    both = Context(
        torch.cat([uncond.tokens_TD, cond.tokens_TD]),
        uncond.lengths + cond.lengths,
        torch.cat([uncond.pooled_BD, cond.pooled_BD]),
    )
    v_uncond, v_cond = model(torch.cat([latent_BCHW] * 2), torch.cat([t_B] * 2), *both).chunk(2)
    return guided(v_uncond, v_cond, scale)
