"""The U-Net of latent diffusion (arXiv 2112.10752), which Stable Diffusion 1 and 2 are, through diffusers' class.

B batch · C channels · H W height, width · L tokens of the longest context, T of all · D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
    guidance_embedding: ClassVar[bool] = False

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
        super().__init__()
        self.config = config
        self.label_in = nn.Embedding(num_classes + 1, config.context_dim)
        nn.init.normal_(self.label_in.weight, std=0.02)
        self.unet = _denoiser(config, channels)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        dtype = self.label_in.weight.dtype
        context_BLD = self.label_in(label_B)[:, None]
        return self.unet(x_BCHW.to(dtype), TIMESTEP_SCALE * t_B.float(), context_BLD, return_dict=False)[0]


class TextUNet(nn.Module):
    """Called as an MM-DiT is, (latent, t, context, lengths, …) → [B, C, H, W]: each sample's text is its context.

    Pooled text and embedded guidance are not used: Stable Diffusion 1 and 2 have neither.
    """

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.unet = _denoiser(config, channels)

    def forward(
        self, latent_BCHW: Tensor, t_B: Tensor, context_TD: Tensor, lengths: Sequence[int], *_: Tensor | None
    ) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        context_BLD = pad_sequence(context_TD.to(dtype).split(list(lengths)), batch_first=True)
        length_B = torch.tensor(lengths, device=context_TD.device)
        mask_BL = torch.arange(context_BLD.shape[1], device=context_TD.device) < length_B[:, None]
        x_BCHW, t_B = latent_BCHW.to(dtype), TIMESTEP_SCALE * t_B.float()
        return self.unet(x_BCHW, t_B, context_BLD, encoder_attention_mask=mask_BL, return_dict=False)[0]


def _denoiser(config: UNetConfig, channels: int) -> Any:
    """Stable Diffusion's network, but for its sizes."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in config.attention[::-1]),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,  # diffusers' name for it
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
    )
    for parameter in unet.conv_out.parameters():
        nn.init.zeros_(parameter)
    return unet
