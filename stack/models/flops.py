"""Floating-point operations of MM-DiT in closed form: matrix products only, a multiplication and an addition each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stack.models.mmdit import TIMESTEP_SIZE

if TYPE_CHECKING:
    from stack.models.mmdit import MMDiTConfig


def flops_per_sample(config: MMDiTConfig, num_image_tokens: int, num_text_tokens: int) -> tuple[int, int]:
    """FLOPs of one sample: (forward, forward and backward). Recomputation is not counted.

    The backward pass costs twice the forward, but for the first layers, whose inputs need no gradient.
    """
    D, N, L = config.width, num_image_tokens, num_text_tokens
    patch = config.patch_size**2 * config.in_channels

    qkv, residual = 3 * D * D, (1 + 2 * config.mlp_ratio) * D * D
    tokens = config.depth * (N + L) * (qkv + residual) - L * residual
    modulation = config.depth * 12 * D * D - 4 * D * D
    attention = config.depth * 2 * (N + L) ** 2 * D
    embedders = 2 * D * D
    final = 2 * D * D + N * D * patch
    inputs = N * patch * D + L * config.context_dim * D + (TIMESTEP_SIZE + config.pooled_dim) * D

    forward = 2 * (tokens + modulation + attention + embedders + final + inputs)
    return forward, 3 * forward - 2 * inputs
