"""What a flow of images is of: their pixels, or their latents under a frozen autoencoder.

Shapes: B batch · C channels · H W height, width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoencoders import codec
from autoencoders.codec import Codec, Moments
from stack import dist
from stack.config import UserError
from stack.flow.noise import Draws
from stack.flow.samplers import NoiseFn

PAIRED = "posterior_paired"
"""Stream that draws second images' latents."""


class Space:
    """channels, sides: of what the flow is of, (width, height).  autoencoder: its fingerprint; None: pixels."""

    def __init__(
        self, autoencoder: str | None, channels: int, sides: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        """channels, sides: of the images. UserError where they do not fit the autoencoder."""
        self._codec: Codec | None = None
        self.autoencoder, self.channels, self.sides, self.image_sides = None, channels, list(sides), list(sides)
        self.image_channels = channels
        if autoencoder is None:
            return
        self._codec = Codec.load(autoencoder, dist.frozen_dtype(device)).to(device)
        self.autoencoder, factor = codec.fingerprint(autoencoder), self._codec.factor
        if channels != 3:
            raise UserError(f"objective.autoencoder takes images in colour, and data.channels is {channels}")
        if odd := [side for both in sides for side in both if side % factor]:
            raise UserError(f"data.buckets: a side of {odd[0]} pixels does not divide by the autoencoder's {factor}")
        self.channels = self._codec.channels
        self.sides = [(width // factor, height // factor) for width, height in sides]

    @torch.no_grad()
    def enter(self, image_BCHW: Tensor, draws: Draws, stream: str = "posterior") -> Tensor:
        """Of images in −1…1 the latents [B, C, H, W], drawn from their posterior by a stream of `draws`."""
        if self._codec is None:
            return image_BCHW
        mean_BCHW, logvar_BCHW = (one.float() for one in self._codec.encode(image_BCHW.to(self._codec.vae.dtype)))
        noise_BCHW = draws.normal(stream, tuple(mean_BCHW.shape[1:])).to(image_BCHW.device)
        return codec.draw(Moments(mean_BCHW, logvar_BCHW), noise_BCHW, self._codec.affine)

    def beginning(self, draws: Draws, device: torch.device, starts_BCHW: Tensor | None = None) -> NoiseFn:
        """Of samples `draws`, of the first of `sides`; "noise" is what sampling starts from: `starts_BCHW`, images in
        −1…1, where the flow leads from images."""
        (width, height) = self.sides[0]
        shape = (self.channels, height, width)

        def noise(stream: str) -> Tensor:
            if stream == "noise" and starts_BCHW is not None:
                return self.enter(starts_BCHW.to(device), draws, PAIRED)
            return draws.normal(stream, shape).to(device)

        return noise

    @torch.no_grad()
    def leave(self, x_BCHW: Tensor) -> Tensor:
        """The images, in −1…1."""
        if self._codec is None:
            return x_BCHW.clamp(-1, 1)
        return self._codec.decode(x_BCHW.to(self._codec.vae.dtype)).float()
