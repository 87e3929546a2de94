"""Encode captioned images once: shards of raw samples → shards of latent moments and text embeddings.

One output shard for each source shard. Finished shards are skipped, half-written ones done again; any number of workers
on any number of nodes share one folder by claims (`stack.claims`), and whoever sees the last shard finished writes the
manifest. What comes out is the same to the last byte, however many they were and whichever were killed.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from autoencoders.codec import Codec, fingerprint
from stack import config as configuration
from stack import dist
from stack.claims import Claims, owners
from stack.config import Config, UserError
from stack.data import mlperf
from stack.data.buckets import BucketConfig, histogram
from stack.data.dataset import say_damage
from stack.data.index import ShardIndex
from stack.data.remote import CacheConfig, ShardCache, Stat, is_remote
from stack.data.safety import EMPTY_CAPTION, Rejected, check_budget, entry
from stack.data.schema import DTYPES, MANIFEST, Manifest, ShardRecord, T5Dtype, load_manifest, text_tensors, to_bytes
from stack.data.shards import ShardReader, ShardSet, index_shards, unique_names
from stack.files import publish
from stack.log import progress, say
from stack.preencode.pipeline import CHUNK_BATCHES, Encoders, no_caption, overlapped, read_samples
from stack.preencode.writer import ShardWriter, outputs, stats_path
from stack.shown import redact
from stack.text.encoders import TextConfig, TextEncoders, fingerprints

_POLL_S = 1.0
_NOT_BROKEN = ("smaller than min_side", "the tokenizers of")  # reasons that say nothing against a sample


class PreencodeConfig(Config):
    source: str
    """Raw shards (img2dataset's layout), or MLPerf's pre-encoded ones: a folder, a .tar, a glob or a URL."""
    out: Path
    """Folder for the pre-encoded shards."""
    index: Path | None = None
    """Folder for the source shards' indices; beside the shards if not given."""
    cache: CacheConfig = CacheConfig()
    """Where remote shards are kept on this node."""
    captions: dict[str, str] = Field(default={"txt": "txt"})
    """Name → where the caption stands: txt, or json.FIELD for a field of KEY.json. Every sample has the first; each is
    encoded, and training draws one of them."""
    buckets: BucketConfig = BucketConfig(resolution=32)
    min_side: PositiveInt = 1
    """Smaller images are left out."""
    max_rejected: float = Field(default=0.05, ge=0, le=1)
    """Share of the samples that may be broken; above it the job stops. Images below min_side do not count."""
    autoencoder: str
    text: TextConfig
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    t5_dtype: T5Dtype = None
    """float8: T5's embeddings in eight bits with a scale a token, half the bytes of bfloat16."""
    batch_size: PositiveInt = 64
    decoders: NonNegativeInt = 2
    """Threads that read and decode images while the encoders work."""

    @field_validator("captions")
    @classmethod
    def _check_captions(cls, captions: dict[str, str]) -> dict[str, str]:
        for name, place in captions.items():
            if place != "txt" and not (place.startswith("json.") and len(place) > 5):
                raise ValueError(f"caption {name!r} stands in {place!r}, expected txt or json.FIELD")
        if not captions:
            raise ValueError("name one caption at least")
        return captions


def preencode(config: PreencodeConfig) -> Manifest:
    """Run the job until every shard is finished, by this worker or another; the manifest.

    Raises UserError for missing sources or encoders, where `out` holds shards of another configuration, and where too
    many samples are broken.
    """
    cache = ShardCache(config.cache)
    source = ShardSet(index_shards(config.source, config.index, cache))
    unique_names(source.indices)
    for index in source.indices:
        if index.encoded:
            raise UserError(f"source: {redact(index.url)} holds pre-encoded samples; name raw shards")
    say_damage(source.indices)
    targets = [config.out / index.name for index in source.indices]
    for index, target in zip(source.indices, targets, strict=True):
        if not is_remote(index.url) and Path(index.url).resolve() == target.resolve():
            raise UserError(f"out: {config.out} is the folder of the source shards, which would be overwritten")
    mark = mark_of(config, source, encoder_fingerprints(config), dist.frozen_dtype(dist.device()))
    _refuse_other_shards(config.out, mark)
    finished = [_stats(target, mark) is not None for target in targets]
    if not all(finished):
        _work(config, source, ShardReader(source.indices, cache), targets, mark)
    stats = [stats for target in targets if (stats := _stats(target, mark)) is not None]
    if all(finished) and (config.out / MANIFEST).exists():
        manifest = load_manifest(config.out)
    else:
        _check_budget(config, source, dict(enumerate(stats)))
        manifest = _write_manifest(config, source, targets, stats)
    counts = np.sum([one["buckets"] for one in stats], axis=0).tolist()
    say(f"{config.out}: samples by bucket, width×height\n{histogram(counts, config.buckets.rule())}")
    return manifest


def _work(config: PreencodeConfig, source: ShardSet, reader: ShardReader, targets: list[Path], mark: str) -> None:
    """Encode shards that nobody has in hand until all are finished, taking over those of workers that died."""
    known = {number: stats for number, target in enumerate(targets) if (stats := _stats(target, mark)) is not None}
    _check_budget(config, source, known)
    total = source.num_samples + sum(len(index.rejected) for index in source.indices)
    expected = [len(_foreseen(config, source.index(number))) for number in range(len(targets))]
    num_broken = sum(
        len(_broken(known[number]["rejected"])) if number in known else count for number, count in enumerate(expected)
    )
    encoders = Encoders(config)
    if any(mlperf.EXTENSIONS[0] in index.extensions for index in source.indices):
        _check_form(config, source, encoders)
    claims, began = Claims(config.out / ".claims"), time.monotonic()
    left = {number: target for number, target in enumerate(targets) if number not in known}
    done = source.num_samples - sum(len(source.indices[number]) for number in left)
    waiting_said = False
    with progress("preencode", source.num_samples, "sample", done) as advance:
        while left:
            before = len(left)
            for number, target in list(left.items()):
                with claims.hold(target.stem) as mine:
                    if mine and _stats(target, mark) is None:
                        claims.sweep(config.out, [path.name for path in outputs(target)])
                        _fetch_next(reader, number, left, claims)
                        _encode_shard(config, encoders, source, reader, number, target, mark, advance)
                    elif mine:
                        advance(len(source.indices[number]))
                    if mine and (stats := _stats(target, mark)) is not None:
                        known[number] = stats
                        del left[number]
                        num_broken += len(_broken(stats["rejected"])) - expected[number]
                        if num_broken > config.max_rejected * total:  # all shards are walked through once, to say so
                            _check_budget(config, source, known)
            if left and len(left) == before:
                if not waiting_said:
                    others = ", ".join(owners(config.out / ".claims"))
                    say(f"{config.out}: waiting for shards of other workers: {others}")
                    waiting_said = True
                time.sleep(_POLL_S)
    wall = time.monotonic() - began
    if encoders.seconds:
        say(f"{config.out}: {wall:.1f} s, {100 * encoders.seconds / wall:.1f} % of them inside the encoders")


def _fetch_next(reader: ShardReader, number: int, left: dict[int, Path], claims: Claims) -> None:
    """Open shard `number`; while it is encoded, a thread brings the next one that nobody has in hand into the cache."""
    here, cache = reader.indices[number], reader.cache
    if not is_remote(here.url):
        return
    reader.handle(number)
    held = claims.held()
    following = next((other for other, target in left.items() if other > number and target.stem not in held), None)
    if following is None or cache is None:
        return
    index = reader.indices[following]
    if here.size + index.size <= cache.max_bytes:  # else it would push out what is being read
        threading.Thread(target=_fetch, args=(cache, index), daemon=True).start()


def _fetch(cache: ShardCache, index: ShardIndex) -> None:
    with suppress(UserError, OSError):  # whoever needs the shard says so
        cache.fetch(index.url, Stat(index.size, index.version))


def _check_budget(config: PreencodeConfig, source: ShardSet, known: dict[int, dict[str, Any]]) -> None:
    """UserError where too many samples are broken, which rejected.jsonl then lists. known: stats of finished shards."""
    listed: list[dict[str, str]] = []
    for number, index in enumerate(source.indices):
        if number in known:
            listed += known[number]["rejected"]
        else:
            listed += [entry(index.name, *rejected) for rejected in _foreseen(config, source.index(number))]
    broken = _broken(listed)
    total = source.num_samples + sum(len(index.rejected) for index in source.indices)
    try:
        check_budget(broken, total, config.max_rejected)
    except UserError as error:
        _write_rejected(config, listed)
        raise UserError(f"{error}; {config.out / 'rejected.jsonl'} lists them") from None


def _foreseen(config: PreencodeConfig, index: ShardIndex) -> list[Rejected]:
    """What the index knows already to be broken in a shard. An image that is too small is not: it is left out."""
    first, *further = config.captions.values()
    reasons = dict[int, str]()
    if first == "txt":
        silent = np.flatnonzero(index.caption_length[:, 0] < 0).tolist()
        reasons = dict.fromkeys(silent, no_caption(first)) | index.bad_captions
    elif "txt" in further:
        reasons = {row: reason for row, reason in index.bad_captions.items() if not reason.startswith(EMPTY_CAPTION)}
    large = np.minimum(index.width, index.height) >= config.min_side
    return [*index.rejected, *(Rejected(index.key(row), reason) for row, reason in reasons.items() if large[row])]


def _broken(listed: list[dict[str, str]]) -> list[Rejected]:
    """Of the samples that were left out, those that are broken."""
    return [Rejected(e["key"], e["reason"]) for e in listed if not e["reason"].startswith(_NOT_BROKEN)]


def _write_rejected(config: PreencodeConfig, listed: list[dict[str, str]]) -> None:
    with publish(config.out / "rejected.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in listed), encoding="utf-8")


def _check_form(config: PreencodeConfig, source: ShardSet, encoders: Encoders) -> None:
    """UserError unless the configuration names encoders and a form of captions that can have made MLPerf's samples."""
    form = {"pad": "full", "t5_max_tokens": mlperf.TOKENS, "clip_tokens": False, "clip_projection": False}
    odd = [f"text.{key}={value}" for key, value in form.items() if config.text.form[key] != value]
    if config.text.t5 is None or config.text.clip_l is None or config.text.clip_g is not None:
        odd.append("text.t5 and text.clip_l, no text.clip_g")
    elif encoders.text.dims != {"t5": mlperf.T5_DIM, "clip_l": mlperf.CLIP_DIM}:
        odd.append(f"encoders {mlperf.T5_DIM} and {mlperf.CLIP_DIM} wide, not {encoders.text.dims}")
    if (encoders.codec.channels, encoders.codec.factor) != (mlperf.CHANNELS, mlperf.FACTOR):
        odd.append(f"an autoencoder of {mlperf.CHANNELS} channels and factor {mlperf.FACTOR}")
    if odd:
        raise UserError(f"{redact(config.source)}: MLPerf's samples need {', '.join(odd)}")


def mark_of(config: PreencodeConfig, source: ShardSet, encoders: dict[str, str], compute: torch.dtype) -> str:
    """Fingerprint of all that decides an output byte: the encoders' own, and what they calculate in, among them."""
    free = {"source", "out", "index", "cache", "max_rejected", "decoders", "autoencoder"}
    values = config.model_dump(mode="json", exclude=free)
    values["buckets"] = config.buckets.rule().buckets
    values["captions"] = list(config.captions.items())
    values["text"] = {**config.text.form, "batch_size": config.text.batch_size}  # which captions are padded together
    values["encoders"] = encoders
    values["source"] = source.fingerprint()
    values["compute"] = str(compute)
    return configuration.fingerprint_of(values)


def encoder_fingerprints(config: PreencodeConfig) -> dict[str, str]:
    """Reads the weights of all encoders."""
    return {"autoencoder": fingerprint(config.autoencoder), **fingerprints(config.text)}


def _refuse_other_shards(out: Path, mark: str) -> None:
    """UserError for a folder whose shards another configuration wrote."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.glob("*_stats.json")):
        stats = read_stats(path)
        if stats is not None and stats.get("mark") != mark:
            raise UserError(
                f"{path}: this shard was made from other sources, encoders or settings than this configuration names: "
                "give `out` a new folder, or remove the old one"
            )


def _stats(target: Path, mark: str) -> dict[str, Any] | None:
    path = stats_path(target)
    if not (path.exists() and target.exists()):
        return None
    stats = read_stats(path)
    return stats if stats is not None and stats.get("mark") == mark else None


def read_stats(path: Path) -> dict[str, Any] | None:
    """None for a file that a broken disk left: its shard is done again."""
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return stats if isinstance(stats, dict) else None


def _encode_shard(
    config: PreencodeConfig,
    encoders: Encoders,
    source: ShardSet,
    reader: ShardReader,
    number: int,
    target: Path,
    mark: str,
    advance: Any,
) -> None:
    """Write one output shard."""
    index = source.index(number)
    listed = list(index.rejected)
    counts = [0] * len(encoders.rule.buckets)
    writer = ShardWriter(target, DTYPES[config.dtype], config.t5_dtype)
    samples = read_samples(config, encoders.rule, reader, number)
    try:
        for outcomes in overlapped(samples, encoders, CHUNK_BATCHES * config.batch_size):
            for outcome in outcomes:
                if isinstance(outcome, Rejected):
                    listed.append(outcome)
                else:
                    raw, sample = outcome
                    writer.add(raw.key, sample, raw.facts)
                    counts[raw.bucket] += 1
            advance(len(outcomes))
        rejected = [entry(index.name, *one) for one in listed]
        facts = {"mark": mark, "source": index.name, "rejected": rejected, "damage": index.damage, "buckets": counts}
        reader.close()  # else a remote shard that the cache removes to fetch the next one stays on the disk
        writer.finish(facts)
    except BaseException:
        writer.abandon()
        raise
    for kind, count in Counter(reason.partition(":")[0] for _, reason in listed).items():
        say(f"{index.name}: {count} samples left out: {kind}")


def _write_manifest(
    config: PreencodeConfig, source: ShardSet, targets: Sequence[Path], stats: list[dict[str, Any]]
) -> Manifest:
    filled = [s for s in stats if s["samples"]]
    if not filled:
        raise UserError(f"{redact(config.source)}: not one sample could be encoded; see {config.out / '*_stats.json'}")
    positions = sum(s["positions"] for s in filled)
    mean = np.sum([s["sum"] for s in filled], axis=0) / positions
    variance = np.sum([s["squares"] for s in filled], axis=0) / positions - mean**2
    listed = [entry for s in stats for entry in s["rejected"]]
    _write_rejected(config, listed)
    codec = Codec.load(config.autoencoder)
    empty = TextEncoders(config.text).encode([""])[0]
    manifest = Manifest(
        source=source.fingerprint(),
        encoders=encoder_fingerprints(config),
        **config.text.form,
        buckets=list(config.buckets.rule().buckets),
        dtype=config.dtype,
        t5_dtype=config.t5_dtype,
        captions=list(config.captions),
        scale=codec.affine.scale,
        shift=codec.affine.shift,
        latent_channels=codec.channels,
        latent_factor=codec.factor,
        latent_mean=mean.tolist(),
        latent_std=np.sqrt(variance).tolist(),
        empty_caption=base64.b64encode(to_bytes(text_tensors(empty), DTYPES[config.dtype])).decode(),
        samples=sum(s["samples"] for s in stats),
        rejected=len(listed),
        shards={
            t.name: ShardRecord(samples=s["samples"], sha256=s["sha256"]) for t, s in zip(targets, stats, strict=True)
        },
    )
    with publish(config.out / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest
