"""Training losses of a KL autoencoder (latent diffusion, arXiv 2112.10752, without the adversarial part).

Shapes: B batch · C channels · H W height, width.
"""

from __future__ import annotations

from torch import Tensor

from autoencoders.codec import Moments


def l1_B(image_BCHW: Tensor, output_BCHW: Tensor) -> Tensor:
    """Mean absolute error of each image [B]."""
    return (image_BCHW - output_BCHW).abs().flatten(1).mean(1)


def l2_B(image_BCHW: Tensor, output_BCHW: Tensor) -> Tensor:
    """Mean square error of each image [B]."""
    return (image_BCHW - output_BCHW).square().flatten(1).mean(1)


def kl_B(moments: Moments) -> Tensor:
    """KL(q ‖ N(0, 1)) in nats, summed over a sample's latent [B]."""
    mean, logvar = moments
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
