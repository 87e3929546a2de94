"""A classifier of noisy images, log p(y | x_t), for classifier guidance (ADM, arXiv 2105.05233, §4 and appendix H): the
encoding half of ADM's U-Net, pooled over all positions.

B batch · C channels · H W height, width · K classes
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from stack.config import Config
from stack.nn.embed import TIMESTEP_SCALE


class ClassifierNetworkConfig(Config):
    block_out_channels: tuple[PositiveInt, ...] = (32, 64)
    """Channels at each resolution, each half the one before it; attention stands at the lowest."""
    layers_per_block: PositiveInt = 1
    norm_groups: PositiveInt = 8
    head_size: PositiveInt = 32
    """Channels of a head of attention."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ClassifierNetworkConfig:
        for channels in self.block_out_channels:
            if channels % self.norm_groups:
                raise ValueError(f"block_out_channels {channels} is not a multiple of norm_groups {self.norm_groups}")
        last = self.block_out_channels[-1]
        if last % self.head_size:
            raise ValueError(f"block_out_channels ends with {last}, not a multiple of head_size {self.head_size}")
        return self


class NoisyClassifier(nn.Module):
    """(x [B, C, H, W], t [B] in 0…1) → log-probabilities [B, K] in float32. It starts as the uniform distribution;
    its other weights are drawn from torch's generator."""

    def __init__(self, config: ClassifierNetworkConfig, channels: int, num_classes: int) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        levels, last = len(config.block_out_channels), config.block_out_channels[-1]
        unet: Any = UNet2DModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            attention_head_dim=config.head_size,
            norm_num_groups=config.norm_groups,
            resnet_time_scale_shift="scale_shift",
        )
        self.time_proj, self.time_embedding, self.conv_in = unet.time_proj, unet.time_embedding, unet.conv_in
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        self.norm_out = nn.GroupNorm(config.norm_groups, last)
        self.out = nn.Linear(last, num_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        dtype = self.out.weight.dtype
        time_BD = self.time_embedding(self.time_proj(TIMESTEP_SCALE * t_B.float()).to(dtype))
        hidden_BCHW = self.conv_in(x_BCHW.to(dtype))
        for block in self.down_blocks:
            hidden_BCHW, _ = block(hidden_BCHW, time_BD)
        hidden_BCHW = F.silu(self.norm_out(self.mid_block(hidden_BCHW, time_BD)))
        return self.out(hidden_BCHW.mean((2, 3))).float().log_softmax(1)
