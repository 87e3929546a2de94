"""Encode captioned images once: shards of raw samples → shards of latent moments and text embeddings.

One output shard for each source shard. Finished shards are skipped, half-written ones done again; any number of workers
on any number of nodes share one folder by claims (`stack.claims`), and whoever sees the last shard finished writes the
manifest. What comes out is the same to the last byte, however many they were and whichever were killed.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from autoencoders.codec import Codec, fingerprint
from stack import config as configuration
from stack import dist
from stack.config import Config, Location, UserError
from stack.data import cuts, mlperf
from stack.data.buckets import BucketConfig, histogram
from stack.data.cuts import Cut
from stack.data.dataset import say_damage
from stack.data.index import ShardIndex
from stack.data.remote import CacheConfig, ShardCache, Stat, is_remote
from stack.data.safety import EMPTY_CAPTION, Rejected, entry, over_budget
from stack.data.schema import (
    DTYPES,
    MANIFEST,
    READING,
    Manifest,
    ShardRecord,
    T5Dtype,
    load_manifest,
    text_tensors,
    to_bytes,
)
from stack.data.shards import ShardReader, ShardSet, index_shards, unique_names
from stack.files import publish
from stack.log import progress, say
from stack.preencode.pipeline import CHUNK_BATCHES, Encoders, no_caption, overlapped, read_samples
from stack.preencode.share import Share
from stack.preencode.stats import Finished, read_all, stats_path
from stack.preencode.writer import ShardWriter
from stack.shown import redact
from stack.text.encoders import TextConfig, TextEncoders, fingerprints

_NOT_BROKEN = "smaller than min_side"  # such a sample is left out, but it is not broken
_THREADS = 16  # that read indices: a network file system answers each after a millisecond


class PreencodeConfig(Config):
    source: Location
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
    autoencoder: Location
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
    _refuse_source(config, source, targets)
    # A finished set of an older version stays as it is; one that is not finished is not continued.
    reading = load_manifest(config.out).reading if (config.out / MANIFEST).exists() else READING
    settings = settings_of(config, source, encoder_fingerprints(config), dist.frozen_dtype(dist.device()), reading)
    share = Share(config.out, targets, settings, configuration.fingerprint_of(settings))
    _refuse_source(config, source, targets, share.existing)
    had_all = not share.left
    if share.left and reading != READING:
        say(f"{config.out}: an older version made this set, which read some samples otherwise: see `--verify`")
    if not had_all:
        _work(config, source, ShardReader(source.indices, cache), share)
    if had_all and (config.out / MANIFEST).exists():
        manifest = load_manifest(config.out)
    else:
        _Budget(config, source, share).check()
        manifest = _write_manifest(config, source, share, reading)
        share.clean()
    counts = np.sum([one.buckets for one in share.finished.values()], axis=0).tolist()
    say(f"{config.out}: samples by bucket, width×height\n{histogram(counts, config.buckets.rule())}")
    for line in cuts.lines(manifest.cut):
        say(f"{config.out}: {line}")
    return manifest


def _refuse_source(config: PreencodeConfig, source: ShardSet, targets: list[Path], numbers: Iterable[int] = ()) -> None:
    """UserError where `out` is a folder of source shards, or holds one of the source shards `numbers` by a link."""
    urls = [index.url for index in source.indices]
    folders = {os.path.dirname(url) for url in urls if not is_remote(url)}
    same = [n for n in numbers if not is_remote(urls[n]) and targets[n].exists() and targets[n].samefile(urls[n])]
    if same or config.out.resolve() in map(Path.resolve, map(Path, folders)):
        raise UserError(f"out: {config.out} is the folder of the source shards, which would be overwritten")


def _work(config: PreencodeConfig, source: ShardSet, reader: ShardReader, share: Share) -> None:
    """Encode shards that nobody has in hand until all are finished, taking over those of workers that died."""
    budget = _Budget(config, source, share)
    budget.check()
    encoders = Encoders(config)
    if any(mlperf.EXTENSIONS[0] in index.extensions for index in source.indices):
        _check_form(config, source, encoders)
    began = time.monotonic()
    done = source.num_samples - sum(len(source.indices[number]) for number in share.left)
    with progress("preencode", source.num_samples, "sample", done) as advance:

        def found(number: int) -> None:
            advance(len(source.indices[number]))
            budget.count(number)

        share.on_found = found
        with share.working(), closing(share.turns()) as turns:
            for number in turns:
                _fetch_next(reader, number, share.following())
                stats = _encode_shard(config, encoders, source, reader, number, share, advance)
                if stats is not None:
                    share.done(number, stats)
                    budget.count(number)
    wall = time.monotonic() - began
    if encoders.seconds:
        say(f"{config.out}: {wall:.1f} s, {100 * encoders.seconds / wall:.1f} % of them inside the encoders")


def _fetch_next(reader: ShardReader, number: int, following: int | None) -> None:
    """Open shard `number`; while it is encoded, a thread brings the next one into the cache."""
    here, cache = reader.indices[number], reader.cache
    if not is_remote(here.url):
        return
    reader.handle(number)
    if following is None or cache is None:
        return
    index = reader.indices[following]
    if here.size + index.size <= cache.max_bytes:  # else it would push out what is being read
        threading.Thread(target=_fetch, args=(cache, index), daemon=True).start()


def _fetch(cache: ShardCache, index: ShardIndex) -> None:
    with suppress(UserError, OSError):  # whoever needs the shard says so
        cache.fetch(index.url, Stat(index.size, index.version))


class _Budget:
    """Broken samples of a job: those of finished shards, and what the indices of the others tell before."""

    def __init__(self, config: PreencodeConfig, source: ShardSet, share: Share) -> None:
        self._config, self._source, self._share = config, source, share
        left = list(share.left)
        with ThreadPoolExecutor(_THREADS) as threads:
            looked = list(threads.map(self._look, left))
        self._expected = {number: broken for number, (broken, _) in zip(left, looked, strict=True)}
        self._broken = sum(self._expected.values()) + sum(_broken(one).total() for one in share.finished.values())
        self._total = sum(total for _, total in looked)
        self._total += sum(one.samples + one.rejected.total() for one in share.finished.values())

    def count(self, number: int) -> None:
        """Take in a shard that is finished now. Raises UserError as `check` does."""
        self._broken += _broken(self._share.finished[number]).total() - self._expected.pop(number)
        self.check()

    def check(self) -> None:
        """UserError where too many samples are broken, which rejected.jsonl then lists."""
        most = self._config.max_rejected
        if self._broken <= most * self._total:
            return
        path, kinds = self._config.out / "rejected.jsonl", Counter[str]()
        for one in self._share.finished.values():
            kinds.update(_broken(one))
        for number in self._share.left:
            foreseen = _foreseen(self._config, copy(self._source.indices[number]))
            kinds.update(reason.partition(":")[0] for _, reason in foreseen)
        _write_rejected(self._config, self._source, self._share)
        raise UserError(f"{over_budget(kinds, self._total, most)}; {path} lists them")

    def _look(self, number: int) -> tuple[int, int]:
        """Broken samples, and all, of a shard that is not finished."""
        index = copy(self._source.indices[number])  # what is read of the copy goes with it
        return len(_foreseen(self._config, index)), len(index) + len(index.rejected)


def _broken(shard: Finished) -> Counter[str]:
    """The broken samples among those that were left out, by kind."""
    return Counter({kind: count for kind, count in shard.rejected.items() if not kind.startswith(_NOT_BROKEN)})


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


def _write_rejected(config: PreencodeConfig, source: ShardSet, share: Share) -> None:
    """List what was left out of finished shards, and what is foreseen of the others, in the order of the shards."""
    listing = [number for number, one in share.finished.items() if one.rejected]
    listing = sorted([*listing, *share.left])
    paths = [stats_path(share.targets[number]) for number in listing]
    with publish(config.out / "rejected.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, stats in zip(listing, read_all(paths), strict=True):
            if number in share.finished and stats is not None:
                entries = stats["rejected"]
            else:
                index = copy(source.indices[number])
                entries = [entry(index.name, *rejected) for rejected in _foreseen(config, index)]
            file.writelines(json.dumps(one) + "\n" for one in entries)


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


def mark_of(
    config: PreencodeConfig, source: ShardSet, encoders: dict[str, str], compute: torch.dtype, reading: int
) -> str:
    """Fingerprint of `settings_of`."""
    return configuration.fingerprint_of(settings_of(config, source, encoders, compute, reading))


def settings_of(
    config: PreencodeConfig, source: ShardSet, encoders: dict[str, str], compute: torch.dtype, reading: int
) -> dict[str, Any]:
    """All that decides an output byte, as JSON: the encoders' fingerprints, and what they calculate in, among them.

    reading: of the version that makes the shards (`stack.data.schema.READING`).
    """
    free = {"source", "out", "index", "cache", "max_rejected", "decoders", "autoencoder"}
    values = config.model_dump(mode="json", exclude=free)
    values["buckets"] = config.buckets.rule().buckets
    values["captions"] = list(config.captions.items())
    values["text"] = {**config.text.form, "batch_size": config.text.batch_size}  # which captions are padded together
    values["encoders"] = encoders
    values["source"] = source.fingerprint()
    values["compute"] = str(compute)
    if reading > 1:  # the first had no number
        values["reading"] = reading
    settings: dict[str, Any] = json.loads(json.dumps(values))
    return settings


def encoder_fingerprints(config: PreencodeConfig) -> dict[str, str]:
    """Reads the weights of all encoders."""
    return {"autoencoder": fingerprint(config.autoencoder), **fingerprints(config.text)}


def _encode_shard(
    config: PreencodeConfig,
    encoders: Encoders,
    source: ShardSet,
    reader: ShardReader,
    number: int,
    share: Share,
    advance: Any,
) -> dict[str, Any] | None:
    """Write one output shard; its stats, None if another worker took it over meanwhile."""
    index, target = source.index(number), share.targets[number]
    listed = list(index.rejected)
    counts = [0] * len(encoders.rule.buckets)
    cut: dict[str, Cut] = {}
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
                    cuts.add_sample(cut, raw.key, sample.texts, encoders.text.max_tokens)
            advance(len(outcomes))
        rejected = [entry(index.name, *one) for one in listed]
        facts = {
            "mark": share.mark,
            "source": index.name,
            "rejected": rejected,
            "damage": index.damage,
            "buckets": counts,
            "cut": {name: one.model_dump() for name, one in cut.items()},
        }
        reader.close()  # else a remote shard that the cache removes to fetch the next one stays on the disk
        if not share.may_publish(number):
            writer.abandon()
            advance(-len(index))
            say(f"{index.name}: another worker has taken this shard over, as this one did nothing for so long")
            return None
        stats = writer.finish({**facts, "buckets": counts})
    except BaseException:
        writer.abandon()
        raise
    for kind, count in Counter(reason.partition(":")[0] for _, reason in listed).items():
        say(f"{index.name}: {count} samples left out: {kind}")
    return stats


def _write_manifest(config: PreencodeConfig, source: ShardSet, share: Share, reading: int) -> Manifest:
    stats = [share.finished[number] for number in range(len(share.targets))]
    cut: dict[str, Cut] = {}
    for target, one in zip(share.targets, stats, strict=True):
        cuts.add(cut, one.cut, target.name)
    filled = [s for s in stats if s.samples]
    if not filled:
        raise UserError(f"{redact(config.source)}: not one sample could be encoded; see {config.out / '*_stats.json'}")
    positions = sum(s.positions for s in filled)
    mean = np.sum([s.sum for s in filled], axis=0) / positions
    variance = np.sum([s.squares for s in filled], axis=0) / positions - mean**2
    _write_rejected(config, source, share)
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
        samples=sum(s.samples for s in stats),
        rejected=sum(s.rejected.total() for s in stats),
        reading=reading,
        cut=cut,
        shards={
            t.name: ShardRecord(samples=s.samples, sha256=s.sha256) for t, s in zip(share.targets, stats, strict=True)
        },
    )
    with publish(config.out / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest
