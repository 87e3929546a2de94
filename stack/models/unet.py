"""The U-Net of latent diffusion (arXiv 2112.10752), which Stable Diffusion 1 and 2 are, through diffusers' class.

B batch · C channels · H W height, width · D width of the context
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from stack.config import Config
from stack.nn.embed import TIMESTEP_SCALE


class UNetConfig(Config):
    """The network; the defaults are Stable Diffusion 1's."""

    kind: Literal["unet"] = "unet"
    block_out_channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    """Channels at each resolution, each half the one before it."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Where there are blocks of self-attention and cross-attention to the context; the middle always has one."""
    layers_per_block: PositiveInt = 2
    num_heads: PositiveInt = 8
    context_dim: PositiveInt = 768
    norm_groups: PositiveInt = 32

    @model_validator(mode="after")
    def _check_sizes(self) -> UNetConfig:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} values, block_out_channels {len(self.block_out_channels)}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_groups or channels % self.num_heads:
                raise ValueError(
                    f"block_out_channels {channels} must be a multiple of norm_groups {self.norm_groups} and of "
                    f"num_heads {self.num_heads}"
                )
        return self


class UNet(nn.Module):
    """(x [B, C, H, W], t [B] in 0…1, label [B]) → [B, C, H, W]; the label `num_classes` stands for none.

    The context is one token, the label's embedding, as in latent diffusion's class-conditional models (§4.3.1). Sides
    may be any: what is halved to an odd side is brought back to it. Its weights are drawn from torch's generator: the
    library's, but for the last layer, which is 0 (as ADM's, arXiv 2105.05233).
    """

    def __init__(self, config: UNetConfig, channels: int, num_classes: int) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.config = config
        self.label_in = nn.Embedding(num_classes + 1, config.context_dim)
        down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
        up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
        unet: Any = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            attention_head_dim=config.num_heads,  # diffusers' name for it
            cross_attention_dim=config.context_dim,
            norm_num_groups=config.norm_groups,
        )
        self.unet = unet
        nn.init.normal_(self.label_in.weight, std=0.02)
        for parameter in unet.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        dtype = self.label_in.weight.dtype
        context_BLD = self.label_in(label_B)[:, None]
        return self.unet(x_BCHW.to(dtype), TIMESTEP_SCALE * t_B.float(), context_BLD, return_dict=False)[0]
