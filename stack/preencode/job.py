"""Encode captioned images once: shards of raw samples → shards of latent moments and text embeddings.

One output shard for each source shard. Finished shards are skipped, half-written ones done again, and a lock sees to it
that of several workers on one folder only one does a shard. The last one to finish writes the manifest.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from autoencoders.codec import Codec, fingerprint
from stack import config as configuration
from stack import dist
from stack.config import Config, UserError
from stack.data.buckets import BucketRule, buckets_for
from stack.data.images import decode_image, to_bucket
from stack.data.safety import DecodeError, read_caption
from stack.data.schema import (
    DTYPES,
    MANIFEST,
    EncodedSample,
    Manifest,
    ShardRecord,
    load_manifest,
    text_tensors,
    to_bytes,
)
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.files import lock, publish
from stack.log import progress, say
from stack.preencode.writer import ShardWriter, stats_path, sweep
from stack.text.encoders import TextConfig, TextEncoders, fingerprints

CHUNK_BATCHES = 4
MAX_KEY_BYTES = 80
"""A tar's plain header holds names of 100."""


class PreencodeConfig(Config):
    source: str
    """Raw shards (img2dataset's layout): a folder, a .tar or a glob."""
    out: Path
    """Folder for the pre-encoded shards."""
    index: Path | None = None
    """Folder for the source shards' indices; beside the shards if not given."""
    resolution: int = 32
    """Side of the square bucket in pixels; wide and tall ones have about the same area."""
    min_side: int = 1
    """Smaller images are left out."""
    autoencoder: str
    text: TextConfig
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = 64


class Raw(NamedTuple):
    key: str
    pixels: np.ndarray
    caption: str
    bucket: int
    facts: dict[str, Any]


def preencode(config: PreencodeConfig) -> Manifest | None:
    """Run the job; the manifest, or None where other workers still have shards in hand.

    Raises UserError for missing sources or encoders, and where `out` holds shards of another configuration.
    """
    source = ShardSet(index_shards(config.source, config.index))
    names = [index.path.name for index in source.indices]
    if len(set(names)) < len(names):
        raise UserError(f"{config.source}: two shards have the same file name; encode their folders separately")
    targets = [config.out / name for name in names]
    for index, target in zip(source.indices, targets, strict=True):
        if index.path.resolve() == target.resolve():
            raise UserError(f"out: {config.out} is the folder of the source shards, which would be overwritten")
    mark = _mark(config, source)
    _claim(config.out, mark)
    finished = [_stats(target, mark) is not None for target in targets]
    if not all(finished):
        encoder = _Encoder(config)
        done = sum(len(index) for index, known in zip(source.indices, finished, strict=True) if known)
        with progress("preencode", source.num_samples, "sample", done) as advance:
            for number, target in enumerate(targets):
                with lock(config.out / ".locks" / target.stem) as mine:
                    if mine and _stats(target, mark) is None:
                        sweep(target)
                        _encode_shard(config, encoder, source, number, target, mark, advance)
    if any(_stats(target, mark) is None for target in targets):
        say(f"{config.out}: other workers still have shards in hand; the last one writes {MANIFEST}")
        return None
    if all(finished) and (config.out / MANIFEST).exists():
        return load_manifest(config.out)
    return _write_manifest(config, source, targets, mark)


def _mark(config: PreencodeConfig, source: ShardSet) -> str:
    """Fingerprint of all that decides an output byte."""
    values = config.model_dump(mode="json", exclude={"source", "out", "index"})
    values["text"] = config.text.form
    values["encoders"] = _encoders(config)
    values["source"] = source.fingerprint()
    values["compute"] = str(_compute_dtype())
    del values["autoencoder"]
    return configuration.fingerprint_of(values)


def _encoders(config: PreencodeConfig) -> dict[str, str]:
    return {"autoencoder": fingerprint(config.autoencoder), **fingerprints(config.text)}


def _claim(out: Path, mark: str) -> None:
    """Refuse a folder whose shards another configuration wrote."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.glob("*_stats.json")):
        if json.loads(path.read_text()).get("mark") != mark:
            raise UserError(
                f"{path}: this shard was made from other sources, encoders or settings than this configuration names: "
                "give `out` a new folder, or remove the old one"
            )


def _stats(target: Path, mark: str) -> dict[str, Any] | None:
    path = stats_path(target)
    if not (path.exists() and target.exists()):
        return None
    stats: dict[str, Any] = json.loads(path.read_text())
    return stats if stats["mark"] == mark else None


def _compute_dtype() -> torch.dtype:
    return torch.bfloat16 if dist.device().type == "cuda" else torch.float32


class _Encoder:
    """The frozen networks, on this process's device."""

    def __init__(self, config: PreencodeConfig):
        self.device = dist.device()
        self.dtype = _compute_dtype()
        self.codec = Codec.load(config.autoencoder, self.dtype).to(self.device)
        self.text = TextEncoders(config.text, self.device, self.dtype)
        self.rule: BucketRule = buckets_for(config.resolution)
        self.batch_size = config.batch_size
        odd = [side for bucket in self.rule.buckets for side in bucket if side % self.codec.factor]
        if odd:
            raise UserError(
                f"resolution {config.resolution} gives a bucket side of {odd[0]} pixels, not divisible by "
                f"the autoencoder's factor {self.codec.factor}"
            )

    @torch.inference_mode()
    def encode(self, chunk: list[Raw]) -> list[EncodedSample]:
        """The samples of `chunk`, in order."""
        moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for bucket in sorted({raw.bucket for raw in chunk}):
            members = [i for i, raw in enumerate(chunk) if raw.bucket == bucket]
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                pixels = torch.from_numpy(np.stack([chunk[i].pixels for i in rows])).to(self.device)
                image_BCHW = pixels.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
                mean, logvar = self.codec.encode(image_BCHW)
                moments.update({i: (mean[row].cpu(), logvar[row].cpu()) for row, i in enumerate(rows)})
        texts = self.text.encode([raw.caption for raw in chunk])
        return [EncodedSample(*moments[i], text) for i, text in enumerate(texts)]


def _encode_shard(
    config: PreencodeConfig, encoder: _Encoder, source: ShardSet, number: int, target: Path, mark: str, advance: Any
) -> None:
    index = source.indices[number]
    listed: list[dict[str, str]] = []

    def reject(key: str, reason: str) -> None:
        listed.append({"shard": index.path.name, "key": key, "reason": reason})

    for key, reason in index.rejected:
        reject(key, reason)
    writer = ShardWriter(target, DTYPES[config.dtype])
    try:
        chunk: list[Raw] = []
        for row, raw in _read(config, encoder.rule, source, number, reject):
            if raw is not None:
                chunk.append(raw)
            if chunk and (len(chunk) == CHUNK_BATCHES * config.batch_size or row == len(index) - 1):
                for item, sample in zip(chunk, encoder.encode(chunk), strict=True):
                    if sample.text.fits():
                        writer.add(item.key, sample, item.facts)
                    else:
                        reject(item.key, "the tokenizers of CLIP-L and bigG cut the caption differently")
                chunk = []
            advance(1)
    except BaseException:
        writer.abandon()
        raise
    writer.finish({"mark": mark, "source": index.path.name, "rejected": listed, "damage": index.damage})
    for kind, count in Counter(entry["reason"].partition(":")[0] for entry in listed).items():
        say(f"{index.path}: {count} samples left out: {kind}")


def _read(
    config: PreencodeConfig, rule: BucketRule, source: ShardSet, number: int, reject: Any
) -> Iterator[tuple[int, Raw | None]]:
    """(row, sample) of one source shard, None for a sample that is left out."""
    index = source.indices[number]
    reader = ShardReader(source.indices)
    try:
        for row in range(len(index)):
            key, width, height = str(index.keys[row]), int(index.width[row]), int(index.height[row])
            if len(key.encode(errors="surrogateescape")) > MAX_KEY_BYTES or not key.isprintable():
                reject(key, "name too long or not printable")
                yield row, None
                continue
            if min(width, height) < config.min_side:
                reject(key, f"smaller than min_side: {width}×{height} pixels")
                yield row, None
                continue
            bucket = int(rule.assign(width, height))
            try:
                pixels = to_bucket(
                    decode_image(reader.read(number, row, index.image_extension(row))), rule.buckets[bucket]
                )
                caption = read_caption(reader.read(number, row, "txt"))
            except DecodeError as error:
                reject(key, str(error))
                yield row, None
                continue
            side = rule.buckets[bucket]
            facts = {"caption": caption, "width": width, "height": height, "bucket": list(side)}
            yield row, Raw(key, pixels, caption, bucket, facts)
    finally:
        reader.close()


def _write_manifest(config: PreencodeConfig, source: ShardSet, targets: list[Path], mark: str) -> Manifest:
    stats = [_stats(target, mark) for target in targets]
    known = [s for s in stats if s is not None]
    filled = [s for s in known if s["samples"]]
    if not filled:
        raise UserError(f"{config.source}: not one sample could be encoded; see {config.out / 'rejected.jsonl'}")
    positions = sum(s["positions"] for s in filled)
    mean = np.sum([s["sum"] for s in filled], axis=0) / positions
    variance = np.sum([s["squares"] for s in filled], axis=0) / positions - mean**2
    listed = [entry for s in known for entry in s["rejected"]]
    with publish(config.out / "rejected.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in listed))
    codec = Codec.load(config.autoencoder)
    empty = TextEncoders(config.text).encode([""])[0]
    manifest = Manifest(
        source=source.fingerprint(),
        encoders=_encoders(config),
        **config.text.form,
        buckets=list(buckets_for(config.resolution).buckets),
        dtype=config.dtype,
        scale=codec.affine.scale,
        shift=codec.affine.shift,
        latent_channels=codec.channels,
        latent_factor=codec.factor,
        latent_mean=mean.tolist(),
        latent_std=np.sqrt(variance).tolist(),
        empty_caption=base64.b64encode(to_bytes(text_tensors(empty), DTYPES[config.dtype])).decode(),
        samples=sum(s["samples"] for s in known),
        rejected=len(listed),
        shards={
            t.name: ShardRecord(samples=s["samples"], sha256=s["sha256"]) for t, s in zip(targets, known, strict=True)
        },
    )
    with publish(config.out / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1))
    return manifest
