"""Classifier-free guidance (arXiv 2207.12598) in one form: v_∅ + γ·(v_y − v_∅). γ = 1 is no guidance.

B batch · L text tokens · D channels of the text
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(latent, t, context, pooled, context mask or None) → velocity, as `stack.models.mmdit.MMDiT`."""


class Condition(NamedTuple):
    """What a text-to-image model is conditioned on; the mask is True at real tokens, None where all are."""

    context_BLD: Tensor
    pooled_BD: Tensor
    mask_BL: Tensor | None = None


def guided(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
    """v_∅ + γ·(v_y − v_∅) with γ = `scale`."""
    return v_uncond + scale * (v_cond - v_uncond)


def classifier_free(
    model: Model, latent_BCHW: Tensor, t_B: Tensor, cond: Condition, uncond: Condition, scale: float
) -> Tensor:
    """The guided velocity, from one call of `model` on both halves; from `cond` alone at scale 1.

    `uncond` may be a batch of one, which then serves all samples, and may differ from `cond` in length.
    """
    if scale == 1:
        return model(latent_BCHW, t_B, *cond)
    both = _joined(uncond, cond, len(latent_BCHW))
    v_uncond, v_cond = model(torch.cat([latent_BCHW] * 2), torch.cat([t_B] * 2), *both).chunk(2)
    return guided(v_uncond, v_cond, scale)


def _joined(uncond: Condition, cond: Condition, batch: int) -> Condition:
    """One batch of 2·`batch`; the shorter text is padded, and masked where it was."""
    halves = (uncond, cond)
    lengths = [half.context_BLD.shape[1] for half in halves]
    context, pooled, mask = [], [], []
    for half, length in zip(halves, lengths, strict=True):
        missing = max(lengths) - length
        real_BL = half.context_BLD.new_ones(1, length, dtype=torch.bool) if half.mask_BL is None else half.mask_BL
        context.append(F.pad(half.context_BLD, (0, 0, 0, missing)).expand(batch, -1, -1))
        pooled.append(half.pooled_BD.expand(batch, -1))
        mask.append(F.pad(real_BL, (0, missing)).expand(batch, -1))
    all_real = lengths[0] == lengths[1] and all(half.mask_BL is None for half in halves)
    return Condition(torch.cat(context), torch.cat(pooled), None if all_real else torch.cat(mask))
