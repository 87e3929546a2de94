"""The sample contract of pre-encoded shards, and the manifest that says what made them.

A sample is KEY.safetensors (latent_mean, latent_logvar [C, h, w]; t5, clip_l, clip_g [L, D]; pooled [D]) and KEY.json.
L is the caption's true length, 0 for CLIP under `text.clip_tokens: false`. Moments are stored: the latent is drawn
late, scale and shift are applied late.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stack.config import Config, UserError, validate
from stack.text.conditioning import EncodedText

if TYPE_CHECKING:
    from stack.text.encoders import TextConfig

VERSION = 2
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MANIFEST = "manifest.json"


@dataclass
class EncodedSample:
    latent_mean: Tensor
    latent_logvar: Tensor
    text: EncodedText


def text_tensors(text: EncodedText) -> dict[str, Tensor]:
    named = {"t5": text.t5, "clip_l": text.clip_l, "clip_g": text.clip_g, "pooled": text.pooled}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def to_bytes(tensors: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()})


def text_from(tensors: dict[str, Tensor]) -> EncodedText:
    return EncodedText(
        t5=tensors.get("t5"), clip_l=tensors.get("clip_l"), clip_g=tensors.get("clip_g"), pooled=tensors["pooled"]
    )


def sample_to_bytes(sample: EncodedSample, dtype: torch.dtype) -> bytes:
    latent = {"latent_mean": sample.latent_mean, "latent_logvar": sample.latent_logvar}
    return to_bytes({**latent, **text_tensors(sample.text)}, dtype)


def sample_from_bytes(data: bytes) -> EncodedSample:
    from safetensors.torch import load

    tensors = load(data)
    return EncodedSample(tensors["latent_mean"], tensors["latent_logvar"], text_from(tensors))


class ShardRecord(Config):
    samples: int
    sha256: str


class Manifest(Config):
    """What every pre-encoded data set says of itself; a stage refuses what does not fit."""

    version: int = VERSION
    source: str
    """Fingerprint of the raw shards' index."""
    encoders: dict[str, str]
    """autoencoder, t5, clip_l, clip_g → sha256 of weights and config."""
    pad: Literal["trim", "full"]
    t5_max_tokens: int
    clip_tokens: bool
    buckets: list[tuple[int, int]]
    """(width, height) in pixels."""
    dtype: Literal["bfloat16", "float32"]
    scale: float
    shift: float
    latent_channels: int
    latent_factor: int
    """Pixels of an image's side to one position of its latent's."""
    latent_mean: list[float]
    latent_std: list[float]
    """Per channel, over all positions, before scale and shift."""
    empty_caption: str
    """The empty caption's embeddings: a safetensors file in base64."""
    samples: int
    rejected: int
    shards: dict[str, ShardRecord]

    @property
    def empty_text(self) -> EncodedText:
        from safetensors.torch import load

        return text_from(load(base64.b64decode(self.empty_caption)))

    def check(self, folder: Path, encoders: dict[str, str], text: TextConfig) -> None:
        """UserError naming both values where the manifest and a configuration disagree."""
        names = sorted({*self.encoders, *encoders})
        pairs = [(f"encoders.{name}", self.encoders.get(name), encoders.get(name)) for name in names]
        for key, own, other in [*pairs, *((key, getattr(self, key), value) for key, value in text.form.items())]:
            if own != other:
                raise UserError(
                    f"{folder / MANIFEST}: {key} is {own!r}, this configuration has {other!r}: "
                    "encode the data again with this configuration, or name the encoders that made it"
                )

    def check_shards(self, folder: Path, found: dict[str, int]) -> None:
        """UserError where the shards of `folder` (name → samples) are not those of the manifest."""
        known = {name: record.samples for name, record in self.shards.items()}
        for name in sorted({*known, *found}):
            if known.get(name) != found.get(name):
                raise UserError(
                    f"{folder / name}: {found.get(name, 0)} samples, {MANIFEST} says {known.get(name, 0)}: "
                    "restore the shard, or encode again into a new folder"
                )


def load_manifest(folder: Path) -> Manifest:
    """Raises UserError where the folder holds no finished pre-encoded data set of this version."""
    import json

    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"data.path: {folder}: no such folder; make it with `mmdit preencode`")
    if not path.exists():
        raise UserError(f"{folder}: no {MANIFEST}; pre-encoding has not finished, run `mmdit preencode` again")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if values.get("version") != VERSION:
        raise UserError(f"{path}: version {values.get('version')!r}, this version of the stack reads {VERSION}")
    return validate(Manifest, values, str(path))
