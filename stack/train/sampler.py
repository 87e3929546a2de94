"""Text to images: the network, its text encoders and the codec behind one call.

Shapes: B batch · C channels · H W height, width · L text tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from autoencoders.codec import Codec, to_uint8
from stack.config import Config, UserError
from stack.flow import guidance, solvers
from stack.flow.noise import NoisePlan
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.conditioning import EncodedText, Pad, collate, join
from stack.text.conditioning import unconditional as unconditional_text


class SamplerConfig(Config):
    solver: Literal["euler", "heun"] = "euler"
    steps: PositiveInt = 20
    guidance: float = 4.0
    """Classifier-free guidance γ in v∅ + γ·(v_y − v∅); 1 is no guidance."""
    embedded_guidance: float = 3.5
    """What a model with a guidance embedding (FLUX.1-dev) is told; `guidance` is 1 for it as a rule."""
    shift: PositiveFloat = 1.0
    """Resolution shift of the time grid."""
    batch_size: PositiveInt = 64


def check_size(model: MMDiTConfig, factor: int, size: tuple[int, int]) -> None:
    """UserError where images of `size` (width, height) do not divide into patches or exceed the position table."""
    unit = factor * model.patch_size
    if min(size) < unit or size[0] % unit or size[1] % unit:
        raise UserError(f"size {size[0]}×{size[1]}: both sides must be multiples of {unit} pixels")
    largest = unit * model.position_table_size
    if not model.rope_axes and max(size) > largest:
        raise UserError(f"size {size[0]}×{size[1]}: the model's position table ends at {largest} pixels")


class Sampler:
    """Draws images; image i of a seed is the same whatever the batch it is drawn in."""

    def __init__(self, network: MMDiT, codec: Codec, pad: Pad):
        self.network = network
        self._codec = codec
        self._pad = pad

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
            noise_BCHW = NoisePlan(seed).at(0, list(numbers[chosen])).normal("noise", shape)
            latent_BCHW = self._integrate(list(texts[chosen]), noise_BCHW, config)
            pixels = self._codec.decode(latent_BCHW.to(next(self._codec.parameters()).dtype))
            images += list(to_uint8(pixels).numpy())
        return images

    def _integrate(self, texts: list[EncodedText], noise_BCHW: Tensor, config: SamplerConfig) -> Tensor:
        device = next(self.network.parameters()).device
        batch = collate(texts, self._pad).to(device)
        context_dim = self.network.config.context_dim
        conditional, unconditional = join(batch, context_dim), unconditional_text(batch, context_dim)

        def network(x_BCHW: Tensor, t_B: Tensor, *context: Any) -> Tensor:
            embedded = self.network.config.guidance_embedding
            return self.network(
                x_BCHW, t_B, *context, torch.full_like(t_B, config.embedded_guidance) if embedded else None
            )

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            return guidance.classifier_free(network, x_BCHW, t_B, conditional, unconditional, config.guidance).float()

        solve = {"euler": solvers.euler, "heun": solvers.heun}[config.solver]
        return solve(velocity, noise_BCHW.to(device), solvers.times(config.steps, config.shift))
