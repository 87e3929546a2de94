"""Text to images: the network, its text encoders and the codec behind one call.

Shapes: B batch · C channels · H W height, width · L text tokens · D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from autoencoders.codec import Codec, to_uint8
from stack.config import UserError
from stack.flow.draw import GuidedConfig, draw
from stack.flow.guidance import Branches, GuidanceConfig, Guided, branches
from stack.flow.noise import Draws, NoisePlan
from stack.flow.process import FlowConfig
from stack.models.captioned import CaptionNetwork
from stack.models.mmdit import MMDiTConfig
from stack.models.unet import UNetConfig
from stack.text.conditioning import Context, EncodedText, Pad, collate, join
from stack.text.conditioning import unconditional as unconditional_text


class SamplerConfig(GuidedConfig):
    guidance: GuidanceConfig = GuidanceConfig(scale=4.0)
    embedded_guidance: float = 3.5
    """What a model with a guidance embedding (FLUX.1-dev) is told; `guidance` is 1 for it as a rule."""
    batch_size: PositiveInt = 64


def check_size(model: MMDiTConfig | UNetConfig, factor: int, size: tuple[int, int]) -> None:
    """UserError where images of `size` (width, height) do not divide into patches or exceed the position table."""
    unit = factor * (model.patch_size if isinstance(model, MMDiTConfig) else 1)
    if min(size) < unit or size[0] % unit or size[1] % unit:
        raise UserError(f"size {size[0]}×{size[1]}: both sides must be multiples of {unit} pixels")
    if not isinstance(model, MMDiTConfig) or model.rope_axes:
        return
    largest = unit * model.position_table_size
    if max(size) > largest:
        raise UserError(f"size {size[0]}×{size[1]}: the model's position table ends at {largest} pixels")


class Sampler:
    """Draws images; image i of a seed is the same whatever the batch it is drawn in."""

    def __init__(
        self, network: CaptionNetwork, codec: Codec, pad: Pad, flow: FlowConfig, weak: CaptionNetwork | None = None
    ):
        """weak: the network that autoguidance leads away from."""
        self.network = network
        self._weak = weak
        self._codec = codec
        self._pad = pad
        self._flow = flow

    @torch.inference_mode()
    def sample(
        self,
        texts: Sequence[EncodedText],
        size: tuple[int, int],
        config: SamplerConfig,
        numbers: Sequence[int],
        seed: int,
    ) -> list[np.ndarray]:
        """Images for encoded captions, uint8 [height, width, 3].

        size: (width, height) in pixels; numbers: which image of `seed` each one is.
        Raises UserError for a size that the network does not draw.
        """
        check_size(self.network.config, self._codec.factor, size)
        shape = (self._codec.channels, size[1] // self._codec.factor, size[0] // self._codec.factor)
        images: list[np.ndarray] = []
        for start in range(0, len(texts), config.batch_size):
            chosen = slice(start, start + config.batch_size)
            draws = NoisePlan(seed).at(0, list(numbers[chosen]))
            latent_BCHW = self._draw(list(texts[chosen]), draws, shape, config)
            pixels = self._codec.decode(latent_BCHW.to(next(self._codec.parameters()).dtype))
            images += list(to_uint8(pixels).numpy())
        return images

    def _draw(self, texts: list[EncodedText], draws: Draws, shape: tuple[int, ...], config: SamplerConfig) -> Tensor:
        device = next(self.network.parameters()).device
        batch = collate(texts, self._pad).to(device)
        context_dim = self.network.config.context_dim
        conditional, unconditional = join(batch, context_dim), unconditional_text(batch, context_dim)

        def output_of(network: CaptionNetwork) -> Callable[[Tensor, Tensor, Context], Tensor]:
            def output(x_BCHW: Tensor, t_B: Tensor, context: Context) -> Tensor:
                told = network.config.guidance_embedding
                guidance_B = torch.full_like(t_B, config.embedded_guidance) if told else None
                return network(x_BCHW, t_B, *context, guidance_B).float()

            return output

        def noise(stream: str) -> Tensor:
            return draws.normal(stream, shape).to(device)

        def of(network: CaptionNetwork) -> Branches:
            output = output_of(network)
            return branches(self._flow, output, conditional, unconditional, Context.cat, config.guidance.batched)

        weak = None if self._weak is None else of(self._weak).conditional
        guided = Guided(config.guidance, self._flow, of(self.network), weak)
        return draw(self._flow, guided, noise, config)
