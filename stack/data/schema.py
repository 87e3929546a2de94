"""The sample contract of pre-encoded shards, and the manifest that says what made them.

A sample is KEY.safetensors (latent_mean, latent_logvar [C, h, w]; t5, clip_l, clip_g [L, D]; pooled [D]) and KEY.json
(caption; width, height of the original; bucket [width, height] and crop [left, top] in pixels of the resized image).
L is the caption's true length, 0 for CLIP under `text.clip_tokens: false`. Moments are stored: the latent is drawn
late, scale and shift are applied late. Of several captions the second's tensors are t5.1, clip_l.1, …, pooled.1, and so
on. T5 kept in float8 has a float32 scale for each token beside it, t5_scale [L].
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stack.config import Config, UserError, is_users, validate
from stack.data import remote
from stack.data.cuts import Cut
from stack.data.safety import check_source
from stack.shown import redact
from stack.text.conditioning import EncodedText

if TYPE_CHECKING:
    from stack.text.encoders import TextConfig

VERSION = 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MANIFEST = "manifest.json"
READING = 2
"""How samples are read. 1: tokenizers got captions uncleaned, and colour profiles of images were ignored."""
T5Dtype = Literal["float8"] | None
_WRITE_ANEW = "remove it and run `mmdit preencode` again, which writes it anew"


@dataclass
class EncodedSample:
    latent_mean: Tensor
    latent_logvar: Tensor
    texts: list[EncodedText | None]
    """One a caption; None for a caption that the sample lacks, never the first."""


def text_tensors(text: EncodedText) -> dict[str, Tensor]:
    named = {"t5": text.t5, "clip_l": text.clip_l, "clip_g": text.clip_g, "pooled": text.pooled}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def to_bytes(tensors: dict[str, Tensor], dtype: torch.dtype, t5_dtype: T5Dtype = None) -> bytes:
    """A safetensors file of `tensors` in `dtype`, T5 in `t5_dtype` if given."""
    from safetensors.torch import save

    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if t5_dtype == "float8" and name.partition(".")[0] == "t5":
            stored[name], stored[name.replace("t5", "t5_scale", 1)] = to_float8(tensor)
        else:
            stored[name] = tensor.to(dtype).contiguous()
    return save(stored)


def to_float8(embedding_LD: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 e4m3 [L, D], float32 scale [L]): each token is scaled so that its largest channel is float8's largest."""
    scale_L = embedding_LD.float().abs().amax(-1).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (embedding_LD.float() / scale_L[:, None]).to(torch.float8_e4m3fn).contiguous(), scale_L


def text_from(tensors: dict[str, Tensor]) -> EncodedText:
    return EncodedText(
        t5=tensors.get("t5"), clip_l=tensors.get("clip_l"), clip_g=tensors.get("clip_g"), pooled=tensors["pooled"]
    )


def sample_to_bytes(sample: EncodedSample, dtype: torch.dtype, t5_dtype: T5Dtype = None) -> bytes:
    tensors = {"latent_mean": sample.latent_mean, "latent_logvar": sample.latent_logvar}
    for number, text in enumerate(sample.texts):
        if text is not None:
            suffix = f".{number}" if number else ""
            tensors |= {name + suffix: tensor for name, tensor in text_tensors(text).items()}
    return to_bytes(tensors, dtype, t5_dtype)


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
    clip_projection: bool = True
    buckets: list[tuple[int, int]]
    """(width, height) in pixels."""
    dtype: Literal["bfloat16", "float32"]
    t5_dtype: T5Dtype
    """float8: T5 has a scale a token; else it is kept in `dtype`."""
    captions: list[str]
    """Names of the captions that a sample has, in the order of their numbers."""
    scale: float
    shift: float
    latent_channels: PositiveInt
    latent_factor: PositiveInt
    """Pixels of an image's side to one position of its latent's."""
    latent_mean: list[float]
    latent_std: list[float]
    """Per channel, over all positions, before scale and shift."""
    empty_caption: str
    """The empty caption's embeddings: a safetensors file in base64."""
    samples: int
    rejected: int
    reading: int = 1
    """The `READING` of the version that made the shards."""
    cut: dict[str, Cut] = Field(default={})
    """By encoder, of those that read only the beginning of some captions."""
    shards: dict[str, ShardRecord]

    @property
    def empty_text(self) -> EncodedText:
        from safetensors.torch import load

        return text_from(load(base64.b64decode(self.empty_caption)))

    def check(self, folder: str, encoders: dict[str, str], text: TextConfig) -> None:
        """UserError naming both values where the manifest and a configuration disagree."""
        names = sorted({*self.encoders, *encoders})
        pairs = [(f"encoders.{name}", self.encoders.get(name), encoders.get(name)) for name in names]
        for key, own, other in [*pairs, *((key, getattr(self, key), value) for key, value in text.form.items())]:
            if own != other:
                raise UserError(
                    f"{_in(folder, MANIFEST)}: {key} is {own!r}, this configuration has {other!r}: "
                    "encode the data again with this configuration, or name the encoders that made it"
                )

    def check_alike(self, folder: str, other_folder: str, other: Manifest) -> None:
        """UserError naming both values where two data sets cannot be mixed."""
        own_keys = {"source", "buckets", "latent_mean", "latent_std", "samples", "rejected", "reading", "cut", "shards"}
        for key in type(self).model_fields:
            if key not in own_keys and getattr(self, key) != getattr(other, key):
                values = "" if key == "empty_caption" else f": {getattr(self, key)!r} and {getattr(other, key)!r}"
                raise UserError(f"data.path: {redact(folder)} and {redact(other_folder)} differ in {key}{values}")

    def check_shards(self, folder: str, found: dict[str, tuple[int, str]]) -> None:
        """UserError where the shards of `folder` (name → samples, sha256) are not those of the manifest."""
        if {name: (record.samples, record.sha256) for name, record in self.shards.items()} == found:
            return
        for name in sorted({*self.shards, *found}):
            samples, sha256 = found.get(name, (0, ""))
            known = self.shards.get(name, ShardRecord(samples=0, sha256=""))
            if (name in self.shards, samples) != (name in found, known.samples):
                problem = f"{samples} samples, {MANIFEST} says {known.samples}"
            elif samples and sha256 != known.sha256:
                problem = f"sha256 is {sha256}, {MANIFEST} says {known.sha256}"
            else:
                continue
            raise UserError(f"{_in(folder, name)}: {problem}: restore the shard, or encode again into a new folder")


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder or URL. Raises UserError if it holds no finished pre-encoded set of this version."""
    folder = str(folder)
    check_source(folder)
    folder = folder.removeprefix("file://")
    path = _in(folder, MANIFEST)
    if remote.is_remote(folder):
        if "?" in folder:
            raise UserError(f"data.path: {redact(folder)}: the URL of a folder has no query")
        data = remote.read_bytes(f"{folder.rstrip('/')}/{MANIFEST}", max_bytes=2**30)
    elif not Path(folder).is_dir():
        raise UserError(f"data.path: {folder}: no such folder; make it with `mmdit preencode`")
    else:
        data = _local_manifest(Path(path))
    if data is None:
        raise UserError(f"{redact(folder)}: no {MANIFEST}; pre-encoding has not finished, run `mmdit preencode` again")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}: {_WRITE_ANEW}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version {version!r}, this version of the stack reads {VERSION}")
    try:
        manifest = validate(Manifest, values, path)
    except UserError as error:
        raise UserError(f"{error}: {_WRITE_ANEW}") from None
    try:
        _ = manifest.empty_text
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(f"{path}: empty_caption cannot be read: {error}: {_WRITE_ANEW}") from None
    return manifest


def _local_manifest(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_users(error):
            raise UserError(f"{path}: cannot be read: {error.strerror}: {_WRITE_ANEW}") from None
        raise


def _in(folder: str, name: str) -> str:
    return f"{redact(folder.rstrip('/'))}/{name}"
