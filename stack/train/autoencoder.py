"""Training a KL autoencoder from raw shards: L1 + KL (latent diffusion, arXiv 2112.10752).

Shapes: B batch · C channels · H W height, width.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from autoencoders import losses
from autoencoders.codec import Codec, to_uint8
from stack.config import Config, UserError
from stack.data.dataset import ImageBatch, ImageDataset
from stack.flow.noise import Draws
from stack.train.objective import Losses
from stack.train.pictures import contact_sheet


class AutoencoderConfig(Config):
    kind: Literal["autoencoder"] = "autoencoder"
    channels: int = 4
    """Latent channels."""
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    """One a resolution; the factor is 2^(number − 1)."""
    layers_per_block: int = 1
    norm_groups: int = 16
    kl_weight: float = 1e-6
    """On the KL summed over a sample, beside the mean absolute error (L1) of its pixels. Latent diffusion's 1e-6
    stands beside a sum over pixels."""
    l2_weight: float = 0.0
    """On the mean square error. L1 alone settles most pixels first: in a short training small shapes and their colours
    come much earlier with some of it."""


def build(config: AutoencoderConfig, seed: int) -> Codec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Codec.build(config.channels, config.block_out_channels, config.layers_per_block, config.norm_groups)


class AutoencoderObjective:
    def __init__(self, config: AutoencoderConfig, data: ImageDataset, seed: int, device: torch.device):
        if data.channels != 3:
            raise UserError(f"data.channels={data.channels}: an autoencoder takes RGB, 3")
        self._config = config
        self._device = device
        self.codec = build(config, seed)
        self.network: nn.Module = self.codec
        odd = [side for bucket in data.sides for side in bucket if side % self.codec.factor]
        if odd:
            raise UserError(f"data.buckets has a side of {odd[0]}, not divisible by factor {self.codec.factor}")
        first = next(iter(data.validation(8)), None)
        self._shown = None if first is None else first.to(device)

    def _noise(self, batch: ImageBatch, draws: Draws) -> Tensor:
        height, width = (side // self.codec.factor for side in batch.image_BCHW.shape[-2:])
        return draws.normal("posterior", (self.codec.channels, height, width)).to(batch.image_BCHW)

    def loss(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Losses:
        dtype = next(network.parameters()).dtype
        output_BCHW, moments = network(batch.image_BCHW.to(dtype), self._noise(batch, draws).to(dtype))
        output_BCHW = output_BCHW.float()
        l1, l2 = (f(batch.image_BCHW, output_BCHW).mean() for f in (losses.l1_B, losses.l2_B))
        kl = losses.kl_B(type(moments)(*(m.float() for m in moments))).mean()
        total = l1 + self._config.l2_weight * l2 + self._config.kl_weight * kl
        return Losses(total, {"l1": l1.detach(), "l2": l2.detach(), "kl": kl.detach()})

    def validate(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Tensor:
        """Mean absolute error of each image [B]."""
        dtype = next(network.parameters()).dtype
        output_BCHW, _ = network(batch.image_BCHW.to(dtype), self._noise(batch, draws).to(dtype))
        return losses.l1_B(batch.image_BCHW, output_BCHW.float())

    def preview(self, network: nn.Module, limit: int | None = None) -> Image:
        """Held-out images (upper row) over their reconstructions (lower row)."""
        if self._shown is None:
            return contact_sheet([np.full((8, 8, 3), 255, np.uint8)])
        assert isinstance(network, Codec)
        image_BCHW = self._shown.image_BCHW[:limit]
        moments = network.encode(image_BCHW.to(next(network.parameters()).dtype))
        output_BCHW = network.decode_raw(moments.mean_BCHW)
        pixels = to_uint8(torch.cat([image_BCHW, output_BCHW.float().clamp(-1, 1)]))
        return contact_sheet(list(pixels.numpy()), columns=len(image_BCHW))

    def metadata(self) -> dict[str, Any]:
        return {"kind": self._config.kind, "autoencoder": self._config.model_dump(mode="json")}
