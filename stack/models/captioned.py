"""Networks for images with captions, behind one call: (latent [B, C, H, W], t [B] in 0…1, context, lengths, pooled,
guidance) → [B, C, H, W], as `stack.models.mmdit.MMDiT`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.models.unet import TextUNet, UNetConfig


def _mmdit_unless_said(values: Any) -> Any:
    if isinstance(values, dict) and values.get("kind") == "dit":
        raise ValueError("kind=dit knows labels, not captions: objective.kind=class_to_image trains it")
    return {"kind": "mmdit", **values} if isinstance(values, dict) else values


NetworkConfig = Annotated[
    Annotated[MMDiTConfig | UNetConfig, Field(discriminator="kind")], BeforeValidator(_mmdit_unless_said)
]
CaptionNetwork = MMDiT | TextUNet


def build(config: MMDiTConfig | UNetConfig, channels: int, seed: int | None = None) -> CaptionNetwork:
    """The network for latents of so many channels, with weights drawn from `seed`; of no meaning without."""
    if isinstance(config, MMDiTConfig):
        network = MMDiT(config)
        if seed is not None:
            network.init_weights(seed)
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        return TextUNet(config, channels)
