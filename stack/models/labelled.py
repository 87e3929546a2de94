"""Networks for images with class labels, behind one call: (x [B, C, H, W], t [B] in 0…1, label [B]) → [B, C, H, W].

The label K of K classes stands for none: what classifier-free guidance takes away, and all that there is where K = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from stack.config import UserError
from stack.models.dit import DiT, DiTConfig
from stack.models.unet import UNet, UNetConfig


def _not_of_captions(values: Any) -> Any:
    if isinstance(values, dict) and values.get("kind") == "mmdit":
        raise ValueError("kind=mmdit knows captions, not labels: objective.kind=text_to_image trains it")
    return values


NetworkConfig = Annotated[
    Annotated[DiTConfig | UNetConfig, Field(discriminator="kind")], BeforeValidator(_not_of_captions)
]
LabelNetwork = DiT | UNet


def build(
    config: DiTConfig | UNetConfig, channels: int, sides: Sequence[tuple[int, int]], num_classes: int, seed: int
) -> LabelNetwork:
    """The network with weights drawn from `seed`, for images of these sides (width, height).

    Raises UserError where they do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, UNetConfig):
            return UNet(config, channels, num_classes)
        if len({side for both in sides for side in both}) > 1:
            shown = ", ".join(f"{width}×{height}" for width, height in sides)
            raise UserError(
                "objective.model.kind=dit takes squares of one size, and data.buckets makes them "
                f"{shown}: set data.buckets.max_ratio=1, or take kind=unet"
            )
        return DiT(config, channels, sides[0][0], num_classes)
