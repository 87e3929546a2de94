"""The latent codec: pixels → moments → latents → pixels, around diffusers' AutoencoderKL.

SD3's, FLUX's and SDXL's autoencoders load from a local folder or a hub id. Moments are what is stored; the latent is
drawn late, and scale and shift are applied late: z = (mean + exp(logvar/2)·ε − shift)·scale.

Shapes: B batch · C channels · H W height, width (of the image or, divided by the factor, of the latent).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn


class Moments(NamedTuple):
    """Mean and log-variance [B, C, H/f, W/f] of the posterior q(z | image)."""

    mean_BCHW: Tensor
    logvar_BCHW: Tensor


class Affine(NamedTuple):
    """How a raw latent becomes what a diffusion model sees: (z − shift)·scale."""

    scale: float
    shift: float


def draw(moments: Moments, noise_BCHW: Tensor, affine: Affine) -> Tensor:
    """A normalised latent [B, C, H, W] from the posterior, with the caller's standard normal noise."""
    z = moments.mean_BCHW + torch.exp(0.5 * moments.logvar_BCHW) * noise_BCHW
    return (z - affine.shift) * affine.scale


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """Images in −1…1, in colour or grey, as uint8 [B, H, W, 3], on the CPU."""
    return ((image_BCHW.expand(-1, 3, -1, -1).float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


class Codec(nn.Module):
    """A KL autoencoder. Images are in −1…1, [B, 3, H, W], sides divisible by `factor`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels: int = vae.config.latent_channels
        self.affine = Affine(float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0))

    @classmethod
    def load(cls, path: str, dtype: torch.dtype = torch.float32) -> Codec:
        """Frozen codec from a diffusers folder or hub id (a `vae` subfolder is found by itself).

        Raises FileNotFoundError where there is no autoencoder.
        """
        from diffusers import AutoencoderKL

        folder = folder_of(path)
        for file in (folder / "config.json", *folder.glob("*.safetensors")):
            file.open("rb").close()  # the libraries report any error as a missing file
        try:
            vae, info = AutoencoderKL.from_pretrained(
                folder, torch_dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"autoencoder {path!r} cannot be loaded: {reason}") from None
        if info["missing_keys"]:
            raise FileNotFoundError(
                f"autoencoder {path!r} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}…"
            )
        return cls(vae).eval().requires_grad_(False)

    @classmethod
    def build(cls, channels: int, block_out_channels: Sequence[int], layers_per_block: int, norm_groups: int) -> Codec:
        """A new autoencoder of SD's architecture, f = 2^(len(block_out_channels) − 1), with random weights."""
        from diffusers import AutoencoderKL

        levels = len(block_out_channels)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=channels,
            norm_num_groups=norm_groups,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        return cls(vae)

    def encode(self, image_BCHW: Tensor) -> Moments:
        """Posterior moments. Raises ValueError where a side is not divisible by the factor."""
        height, width = image_BCHW.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"image of {width}×{height} has a side not divisible by the factor {self.factor}")
        posterior = self.vae.encode(image_BCHW).latent_dist
        return Moments(posterior.mean, posterior.logvar)

    def decode_raw(self, z_BCHW: Tensor) -> Tensor:
        """Images (not clamped) from latents before scale and shift."""
        return self.vae.decode(z_BCHW).sample

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images in −1…1 from normalised latents."""
        return self.decode_raw(latent_BCHW / self.affine.scale + self.affine.shift).clamp(-1, 1)

    def forward(self, image_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Moments]:
        """Reconstruction through a drawn latent, and the moments: what training needs."""
        moments = self.encode(image_BCHW)
        return self.decode_raw(draw(moments, noise_BCHW, Affine(1.0, 0.0))), moments

    def save(self, folder: Path, affine: Affine) -> None:
        """A diffusers folder (config.json, safetensors) with this scale and shift in its config."""
        self.vae.register_to_config(scaling_factor=affine.scale, shift_factor=affine.shift)
        self.vae.save_pretrained(folder)


def folder_of(path: str) -> Path:
    """The local folder of an autoencoder; a hub id's files are fetched into the hub's cache.

    Raises FileNotFoundError where there is neither config.json nor safetensors.
    """
    root = Path(path)
    if not root.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        weights = ["config.json", "diffusion_pytorch_model*.safetensors"]
        try:
            root = Path(snapshot_download(path, allow_patterns=[*weights, *(f"vae/{name}" for name in weights)]))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            raise FileNotFoundError(f"autoencoder {path!r}: no such folder, and no hub id within reach") from None
    folder = root / "vae" if (root / "vae" / "config.json").exists() else root
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"autoencoder {path!r}: expected config.json and *.safetensors in {folder}")
    return folder


def fingerprint(path: str) -> str:
    """sha256 over config and weights of an autoencoder. Raises FileNotFoundError where there is none."""
    folder = folder_of(path)
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
