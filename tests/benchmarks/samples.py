"""Data for the loaders' benchmark: pre-encoded shards by our own writer, and the layout that MLPerf's FLUX reads."""

from __future__ import annotations

import base64
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import BATCH

from stack.data.schema import MANIFEST, EncodedSample, Manifest, ShardRecord, text_tensors, to_bytes
from stack.preencode.writer import ShardWriter, stats_path
from stack.text.conditioning import EncodedText

CHANNELS, FACTOR = 16, 8  # of SD3's and FLUX's autoencoders
T5_DIM, CLIP_L_DIM, CLIP_G_DIM = 4096, 768, 1280
CLIP_TOKENS = 77
SHARD_BYTES = 64e6

FLOAT8_T5: dict[str, Any] = {"t5_dtype": "float8"}


class Form(NamedTuple):
    """Latents of side × side positions, and captions of so many tokens, evenly spread."""

    side: int
    fewest_tokens: int
    most_tokens: int
    samples: int


FORMS = {  # about 400 MB each; a batch's T5 stays below 32 MiB, the most that malloc can be told to keep
    "0.2 MB": Form(32, 4, 20, 60 * BATCH),
    "0.6 MB": Form(64, 8, 48, 20 * BATCH),
    "2 MB": Form(128, 40, 126, 6 * BATCH),
}


class _Noise:
    """bfloat16 from a normal distribution: pieces of one pool, since to draw each value would take minutes."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(2**23, generator=self._generator).bfloat16()

    def __call__(self, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        start = self.integer(0, len(self._pool) - size)
        return self._pool[start : start + size].view(shape).clone()

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self._generator))


def write_shards(folder: Path, form: Form) -> None:
    """A finished pre-encoded data set: SD3's three encoders, random values."""
    noise = _Noise(seed=0)
    records, writer, written, number = {}, None, 0.0, 0
    for sample in range(form.samples):
        if writer is None:
            path = folder / f"{number:05d}.tar"
            writer, written, number = ShardWriter(path, torch.bfloat16), 0.0, number + 1
        t5_tokens = noise.integer(form.fewest_tokens, form.most_tokens)
        clip_tokens = min(t5_tokens, CLIP_TOKENS)
        encoded = _sample(noise, form.side, t5_tokens, clip_tokens, clip_g=True)
        pixels = form.side * FACTOR
        writer.add(f"{sample:08d}", encoded, {"caption": "", "width": pixels, "height": pixels})
        written += _num_bytes(encoded)
        if written >= SHARD_BYTES or sample == form.samples - 1:
            writer.finish({"mark": "", "source": path.name, "rejected": [], "damage": ""})
            stats = json.loads(stats_path(path).read_text())
            records[path.name] = ShardRecord(samples=stats["samples"], sha256=stats["sha256"])
            writer = None
    manifest = Manifest(
        source="",
        encoders={},
        pad="trim",
        t5_max_tokens=256,
        clip_tokens=True,
        buckets=[(form.side * FACTOR, form.side * FACTOR)],
        dtype="bfloat16",
        t5_dtype=None,
        captions=["txt"],
        scale=1.0,
        shift=0.0,
        latent_channels=CHANNELS,
        latent_factor=FACTOR,
        latent_mean=[0.0] * CHANNELS,
        latent_std=[1.0] * CHANNELS,
        empty_caption=base64.b64encode(to_bytes({"pooled": noise(8)}, torch.bfloat16)).decode(),
        samples=form.samples,
        rejected=0,
        shards=records,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def _sample(noise: _Noise, side: int, t5_tokens: int, clip_tokens: int, clip_g: bool) -> EncodedSample:
    text = EncodedText(
        t5=noise(t5_tokens, T5_DIM),
        clip_l=noise(clip_tokens, CLIP_L_DIM),
        clip_g=noise(clip_tokens, CLIP_G_DIM) if clip_g else None,
        pooled=noise(CLIP_L_DIM + (CLIP_G_DIM if clip_g else 0)),
    )
    return EncodedSample(noise(CHANNELS, side, side), noise(CHANNELS, side, side), [text])


def _num_bytes(sample: EncodedSample) -> int:
    (text,) = sample.texts
    assert text is not None
    tensors = (sample.latent_mean, sample.latent_logvar, *text_tensors(text).values())
    return sum(tensor.nbytes for tensor in tensors)


# ---- bytes a sample, FLUX at 256²: T5-XXL, the pooled vector of CLIP-L, moments of 16 × 32 × 32

FLUX_TOKENS, FLUX_SIDE = 256, 32


def our_bytes(folder: Path, lengths: Sequence[int], **options: Any) -> float:
    """Mean bytes of a shard's file a sample, end of archive aside, for captions of `lengths` T5 tokens.

    `options` go to `ShardWriter`. One sample of each length is written and weighed by how often it comes.
    """
    noise, counts, path = _Noise(seed=0), Counter(lengths), folder / "00000.tar"
    writer = ShardWriter(path, torch.bfloat16, **options)
    for length in counts:
        pixels = FLUX_SIDE * FACTOR
        sample = _sample(noise, FLUX_SIDE, length, 0, clip_g=False)
        writer.add(str(length), sample, {"caption": "", "width": pixels, "height": pixels})
    writer.finish({"mark": "", "source": path.name, "rejected": [], "damage": ""})
    with tarfile.open(path) as tar:
        return sum(_tar_bytes(member.size) * counts[int(member.name.split(".")[0])] for member in tar) / len(lengths)


def _tar_bytes(size: int) -> int:
    return 512 + -(-size // 512) * 512


def flux_bytes() -> float:
    """Bytes a sample of KEY.json and one file of bfloat16 bits a tensor, T5 padded to 256 tokens."""
    noise = _Noise(seed=0)
    sample = _sample(noise, FLUX_SIDE, FLUX_TOKENS, 0, clip_g=False)
    (text,) = sample.texts
    assert text is not None
    tensors = {
        "t5.bytes": text.t5,
        "clip.bytes": text.pooled,
        "mean.bytes": sample.latent_mean,
        "logvar.bytes": sample.latent_logvar,
    }
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    files = [json.dumps(shapes).encode()]
    files += [tensor.view(torch.uint16).numpy().tobytes() for tensor in tensors.values() if tensor is not None]
    return float(sum(_tar_bytes(len(file)) for file in files))
