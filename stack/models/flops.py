"""Floating-point operations of MM-DiT in closed form: matrix products only, a multiplication and an addition each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stack.models.mmdit import TIMESTEP_SIZE

if TYPE_CHECKING:
    from stack.models.mmdit import MMDiTConfig


def flops_per_sample(config: MMDiTConfig, num_image_tokens: int, num_text_tokens: int) -> tuple[int, int]:
    """FLOPs of one sample: (forward, forward and backward). Recomputation is not counted.

    FLUX.1 at 256² pixels and 256 text tokens: 20.41 TFLOP (MLPerf Training v5.1 states 20.38).

    The backward pass costs twice the forward, but for the first layers, whose inputs need no gradient.
    """
    D, N, L = config.width, num_image_tokens, num_text_tokens
    S = N + L
    patch = config.patch_size**2 * config.in_channels
    last_text_is_read = config.single_depth > 0

    qkv, residual = 3 * D * D, (1 + 2 * config.mlp_ratio) * D * D
    double = config.depth * (S * (qkv + residual) + 12 * D * D + 2 * S**2 * D)
    if not last_text_is_read:
        double -= L * residual + 4 * D * D
    double += config.image_attention * (N * (qkv + D * D) + 3 * D * D + 2 * N**2 * D)
    single = config.single_depth * (S * (qkv + residual) + 3 * D * D + 2 * S**2 * D)
    embedders = (3 if config.guidance_embedding else 2) * D * D
    final = 2 * D * D + N * D * patch
    sinusoids = (2 if config.guidance_embedding else 1) * TIMESTEP_SIZE
    inputs = N * patch * D + L * config.context_dim * D + (sinusoids + config.pooled_dim) * D

    forward = 2 * (double + single + embedders + final + inputs)
    return forward, 3 * forward - 2 * inputs


# Dense bfloat16 with float32 accumulation, in TFLOP/s, as the vendors state it.
_PEAKS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "GB300": 2500, "GB200": 2500, "B200": 2250}


def peak_tflops(device: torch.device) -> float | None:
    """What `device` can compute in bfloat16 at most; None where that is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
