"""All that is wrong with a set of shards, found by reading every member that training or pre-encoding may read.

Indexing reads headers, training leaves out what it cannot use; here everything is decoded and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np

from stack.config import UserError
from stack.data import layout, mlperf, remote
from stack.data.images import decode_image, unused_metadata
from stack.data.index import ShardIndex, build_index, without_query
from stack.data.layout import Slot
from stack.data.remote import ShardCache, is_remote
from stack.data.safety import IMAGE_EXTENSIONS, MAX_TEXT, DecodeError, open_image, read_caption
from stack.data.schema import MANIFEST, Manifest, ShardRecord, load_manifest, text_tensors
from stack.data.shards import ShardReader, stored_index
from stack.data.sources import find
from stack.shown import printable, redact
from stack.text.encoders import CLIP_TOKENS

_FORMATS = {  # MPO is a JPEG with further pictures behind it, as many telephones write
    "jpg": ("JPEG", "MPO"),
    "jpeg": ("JPEG", "MPO"),
    "png": ("PNG",),
    "webp": ("WEBP",),
}
_STORED = {"bfloat16": "BF16", "float32": "F32"}  # safetensors' names
_NOT_FINITE: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": lambda data: ~np.isfinite(np.frombuffer(data, "<f4")),
    "BF16": lambda data: np.frombuffer(data, "<u2") & 0x7F80 == 0x7F80,  # an exponent of ones
    "F8_E4M3": lambda data: np.frombuffer(data, np.uint8) & 0x7F == 0x7F,  # it has no infinity, and one NaN
}


class Problem(NamedTuple):
    """One thing that is wrong; as text `shard: key: kind: detail`, in one line.

    shard: path or URL of the shard, or of the file or folder that is concerned.  key: "" where it is no sample's.
    reason: `kind` or `kind: detail`.  is_note: it may be intended, as a README in a shard.
    """

    shard: str
    key: str
    reason: str
    is_note: bool = False

    def __str__(self) -> str:
        return ": ".join(printable(part) for part in self[:3] if part)


def lint(
    source: str | Path,
    folder: Path | None = None,
    cache: ShardCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Problem]:
    """Everything that is wrong with the shards of `source` (see `find`): those of a shard together, in order,
    then what concerns the whole set.

    folder: where the shards' indices are kept, if not beside them.  progress: called with (samples, bytes) after each
    shard.  A pre-encoded sample may lack any caption but the first. What a writer left in a remote folder is not looked
    for.

    Raises UserError where there is no shard, and where a shard changes while it is read.
    """
    urls, compressed = find(source)
    sets = {parent: _EncodedSet(parent) for parent in dict.fromkeys(map(_parent, urls))}
    tasks = [sets[_parent(url)].task(url, folder, cache) for url in urls]
    hashes, captioned = [], {}
    for url, report in zip(urls, _run(tasks), strict=True):
        yield from report.problems
        hashes.append(report.hashes)
        captioned[url] = report.captioned
        sets[_parent(url)].found(url, report)
        if progress is not None:
            progress(len(report.hashes), report.size)
    if True in captioned.values():
        silent = [url for url, found in captioned.items() if found is False]
        yield from (Problem(redact(url), "", "no captions: other shards have them") for url in silent)
    yield from _duplicates(urls, hashes, cache)
    for url in compressed:
        yield Problem(redact(url), "", "compressed archive: it is not read; unpack it to a plain .tar")
    named = str(source).removeprefix("file://").rstrip("/") or "/"
    for parent, one in sets.items():
        yield from one.problems(whole=parent == named)


def _parent(url: str) -> str:
    folder, slash, _ = without_query(url).rpartition("/")
    return (folder or slash).rstrip("/") or slash or "."


# ---- one shard


class _Task(NamedTuple):
    url: str
    folder: Path | None
    cache: ShardCache | None
    contract: _Contract | None
    record: ShardRecord | None


class _Report(NamedTuple):
    problems: list[Problem]
    size: int
    encoded: bool
    hashes: np.ndarray
    """uint64 of each usable sample's key, in the index's order."""
    captioned: bool | None = None
    """Whether raw samples have a KEY.txt; None where there are none of them."""


def _run(tasks: list[_Task]) -> Iterator[_Report]:
    """The reports in the order of the tasks, from as many processes as there are cores."""
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    if workers < 2:
        yield from map(_lint_shard, tasks)
        return
    # Forked, as for indexing: the workers touch files, Pillow and NumPy only.
    processes = ProcessPoolExecutor(workers, mp_context=get_context("fork"))
    try:
        yield from processes.map(_lint_shard, tasks)
    finally:
        processes.shutdown(cancel_futures=True)  # who stops reading does not wait for the other shards


def _lint_shard(task: _Task) -> _Report:
    where = redact(task.url)
    try:
        index = _index(task.url, task.cache)
    except OSError as error:
        problem = Problem(where, "", f"shard not readable: {error.strerror or redact(str(error))}")
        return _Report([problem], 0, False, np.empty(0, np.uint64))
    reader = ShardReader([index], task.cache)
    reasons = [("", reason) for reason in _archive(task, index)]
    reasons += [(rejected.key, rejected.reason) for rejected in index.rejected]
    for row in range(len(index)):
        reasons += [(index.key(row), reason) for reason in _sample(index, row, reader, task.contract)]
    reader.close()
    problems = [Problem(where, key, reason) for key, reason in reasons]
    problems += [Problem(where, "", what, is_note=True) for what in index.passed_over]
    captioned = "txt" in index.extensions if len(index) and set(IMAGE_EXTENSIONS) & set(index.extensions) else None
    return _Report(problems, index.size, index.encoded, _hashes(index.keys), captioned)


def _index(url: str, cache: ShardCache | None) -> ShardIndex:
    """Built from the shard itself: a stored one is what is to be checked. Raises OSError."""
    if not is_remote(url):
        if not S_ISREG(os.stat(url).st_mode):  # a pipe would wait for its writer for ever
            raise OSError("not a regular file")
        return build_index(url)
    assert cache is not None, "a remote source needs a cache"
    stat = remote.stat(url)
    return build_index(cache.fetch(url, stat), url, stat.version)


def _hashes(keys: Iterable[str]) -> np.ndarray:
    # Of 10⁸ keys two have the same 64 bits by chance in one set of 3,000.
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)


def _archive(task: _Task, index: ShardIndex) -> Iterator[str]:
    if index.damage:
        yield f"damaged archive: {index.damage}"
    stored = stored_index(task.url, task.folder, task.cache)
    alike = stored is not None and stored.digest == index.digest and stored.rejected == index.rejected
    if stored is not None and (stored.size, stored.version) != (index.size, index.version):
        how = "its samples are the same" if alike else f"{stored.size:,} bytes then, {index.size:,} now"
        yield f"index: the shard changed since it was indexed ({how}); index it again with `mmdit data index`"
    elif stored is not None and not alike:
        yield "index: it tells of other samples than the shard has; remove it, and run `mmdit data index`"
    if task.record is not None:
        if task.record.samples != len(index):
            yield f"samples: {len(index):,}, {MANIFEST} says {task.record.samples:,}"
        if index.sha256 not in ("", task.record.sha256):
            yield f"sha256: {index.sha256}, {MANIFEST} says {task.record.sha256}"


def _sample(index: ShardIndex, row: int, reader: ShardReader, contract: _Contract | None) -> Iterator[str]:
    members = {}
    for extension in index.extensions:
        if index.has(row, extension):
            if extension in ("txt", "json") and index.span(row, extension)[1] > MAX_TEXT:
                yield f"text too large: .{extension} has more than {MAX_TEXT:,} bytes"
                continue
            try:
                members[extension] = reader.read(0, row, extension)
            except OSError as error:
                yield f"member not readable: .{extension}: {error.strerror}"
                return
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is not None:  # further ones are never read
        yield from _image(members[image], image)
    if "txt" in members:
        try:
            read_caption(members["txt"])
        except DecodeError as error:
            yield str(error)
    elif "txt" in index.extensions:
        yield "no caption: others in this shard have one"
    facts: Any = None
    if "json" in members:
        try:
            facts = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            yield f"JSON not readable: {' '.join(str(error).split())}"
        else:
            if not isinstance(facts, dict):
                yield f"JSON not readable: a {type(facts).__name__}, expected an object"
    for extension in mlperf.EXTENSIONS:
        if extension in members and (bad := int(np.count_nonzero(_NOT_FINITE["BF16"](members[extension])))):
            yield f"non-finite: .{extension} has {bad:,} of {len(members[extension]) // 2:,} values"
    if mlperf.EXTENSIONS[0] in members:
        try:
            mlperf.decode(members)
        except DecodeError as error:
            yield str(error)
    if "safetensors" in members:
        yield from _tensors(members["safetensors"], facts, contract)
        if contract is not None and not index.has(row, "json"):
            yield "no JSON"
    elif contract is not None:
        yield f"not pre-encoded: the sample has only {', '.join(f'.{extension}' for extension in members)}"


def _image(data: bytes, extension: str) -> Iterator[str]:
    try:
        held = open_image(data).format
        if held not in _FORMATS[extension]:
            yield f"extension: .{extension} holds {held}"
        decode_image(data)
        yield from unused_metadata(data)
    except DecodeError as error:
        yield str(error)


def _tensors(data: bytes, facts: Any, contract: _Contract | None) -> Iterator[str]:
    slots = layout.parse(data[: layout.header_bytes(data)]).slots
    for name, slot in slots.items():
        bad = int(np.count_nonzero(_NOT_FINITE[slot.dtype](data[slot.start : slot.stop])))
        if bad:
            yield f"non-finite: {name} has {bad:,} of {math.prod(slot.shape):,} values"
    if contract is not None:
        yield from contract.check(slots, facts)


# ---- pre-encoded samples


class _Contract(NamedTuple):
    """What a manifest says of each of its samples."""

    channels: int
    factor: int
    buckets: frozenset[tuple[int, int]]
    dtype: str  # safetensors' name, as in `Slot`
    t5_dtype: str
    widths: dict[str, int]  # channels of each tensor of a caption; t5_scale has none: 0
    lengths: dict[str, range]  # tokens that it may have
    captions: list[str]

    @classmethod
    def of(cls, manifest: Manifest) -> _Contract:
        empty = text_tensors(manifest.empty_text)
        full, clip = manifest.pad == "full", CLIP_TOKENS if manifest.clip_tokens else 0
        t5 = range(manifest.t5_max_tokens if full else 1, manifest.t5_max_tokens + 1)
        clips = range(clip if full else min(1, clip), clip + 1)
        widths = {name: tensor.shape[-1] for name, tensor in empty.items()}
        if manifest.t5_dtype == "float8" and "t5" in empty:
            widths["t5_scale"] = 0
        return cls(
            channels=manifest.latent_channels,
            factor=manifest.latent_factor,
            buckets=frozenset(manifest.buckets),
            dtype=_STORED[manifest.dtype],
            t5_dtype="F8_E4M3" if manifest.t5_dtype == "float8" else _STORED[manifest.dtype],
            widths=widths,
            lengths={"t5": t5, "t5_scale": t5, "clip_l": clips, "clip_g": clips},
            captions=manifest.captions,
        )

    def check(self, slots: dict[str, Slot], facts: Any) -> Iterator[str]:
        """How one sample's tensors, and what its JSON says, differ from the manifest."""
        texts: dict[int, dict[str, Slot]] = defaultdict(dict)
        for name, slot in slots.items():
            base, _, number = name.partition(".")
            if not base.startswith("latent_"):
                texts[int(number or 0)][base] = slot
            wanted = {"t5": self.t5_dtype, "t5_scale": "F32"}.get(base, self.dtype)
            if slot.dtype != wanted:
                yield f"dtype: {name} is {slot.dtype}, {MANIFEST} says {wanted}"
        channels, height, width = slots["latent_mean"].shape
        if channels != self.channels:
            yield f"latent: {channels} channels, {MANIFEST} says {self.channels}"
        side = width * self.factor, height * self.factor
        if side not in self.buckets:
            yield f"bucket: {side[0]}×{side[1]} pixels is none of the buckets in {MANIFEST}"
        for caption, found in sorted(texts.items()):
            yield from self._text(caption, found)
        yield from self._facts(facts, side, set(texts))

    def _text(self, number: int, found: dict[str, Slot]) -> Iterator[str]:
        suffix = f".{number}" if number else ""
        if number >= len(self.captions):
            yield f"captions: tensors of caption {number}, {MANIFEST} names {len(self.captions)} captions, from 0"
        for name in sorted({*self.widths, *found}):
            if name not in found:
                yield f"tensors: {name}{suffix} is missing"
            elif name not in self.widths:
                yield f"tensors: {name}{suffix}, which {MANIFEST} does not know"
            elif (wrong := self._shape(name, found[name].shape)) is not None:
                yield f"shape: {name}{suffix} is {list(found[name].shape)}, {wrong}"

    def _shape(self, name: str, shape: tuple[int, ...]) -> str | None:
        if self.widths[name] not in (0, shape[-1]):
            return f"expected {self.widths[name]} channels"
        if name in self.lengths and shape[0] not in self.lengths[name]:
            return f"expected {self.lengths[name].start} to {self.lengths[name].stop - 1} tokens"
        return None

    def _facts(self, facts: Any, side: tuple[int, int], numbers: set[int]) -> Iterator[str]:
        if not isinstance(facts, dict):
            return  # told already
        of_image = {"crop", "width", "height"}  # a sample that came encoded (MLPerf's) has none of them
        wanted = {"caption", "bucket", *(of_image if of_image & set(facts) else ())}
        if missing := sorted(wanted - set(facts)):
            yield f"JSON: no {', '.join(missing)}"
        if "bucket" in facts and facts["bucket"] != list(side):
            yield f"bucket: JSON says {facts['bucket']}, the latent is of {list(side)} pixels"
        if not of_image & set(facts) and facts.get("caption") is None:
            return  # MLPerf's may lack the text
        written = facts.get("captions", {self.captions[0]: facts.get("caption")})
        for number, name in enumerate(self.captions):
            text = written.get(name) if isinstance(written, dict) else None
            if not text and (number == 0 or number in numbers):
                yield f"caption missing: the text of {name!r}"
            elif text and number not in numbers:
                yield f"caption missing: the tensors of {name!r}"


class _EncodedSet:
    """What a folder should hold, if it is one of pre-encoded shards."""

    def __init__(self, folder: str) -> None:
        self._folder, self._shown = folder, redact(folder)
        self._manifest: Manifest | None = None
        self._contract: _Contract | None = None
        self._reason = ""
        self._samples: dict[str, int] = {}
        self._encoded = False
        try:
            self._manifest = load_manifest(folder)
        except (UserError, PermissionError) as error:  # S3 may answer so for a file that does not exist
            self._reason = f"manifest: {str(error).removeprefix(f'{self._shown}: ')}"
            return
        self._contract = _Contract.of(self._manifest)

    def task(self, url: str, folder: Path | None, cache: ShardCache | None) -> _Task:
        record = self._manifest.shards.get(_name(url)) if self._manifest is not None else None
        return _Task(url, folder, cache, self._contract, record)

    def found(self, url: str, report: _Report) -> None:
        self._encoded |= report.encoded
        self._samples[_name(url)] = len(report.hashes)

    def problems(self, whole: bool) -> Iterator[Problem]:
        """What is wrong with the folder; `whole`: all of its shards were read."""
        if self._manifest is None and not self._encoded:
            return
        if self._reason:
            yield Problem(self._shown, "", self._reason)
        if self._manifest is not None:
            yield from self._against(self._manifest, whole)
        if not is_remote(self._folder):
            yield from self._unfinished(whole)

    def _against(self, manifest: Manifest, whole: bool) -> Iterator[Problem]:
        for name in self._samples:
            if name not in manifest.shards:
                yield Problem(f"{self._shown}/{name}", "", f"shard: {MANIFEST} does not know it")
        if whole:
            for name, record in sorted(manifest.shards.items()):
                if name not in self._samples:
                    told = f"shard missing: {MANIFEST} tells of {record.samples:,} samples"
                    yield Problem(f"{self._shown}/{name}", "", told)
        total = sum(record.samples for record in manifest.shards.values())
        if total != manifest.samples:
            told = f"samples: {manifest.samples:,} in all, but {total:,} in the shards that it lists"
            yield Problem(f"{self._shown}/{MANIFEST}", "", told)
        if not all(bool(tensor.isfinite().all()) for tensor in text_tensors(manifest.empty_text).values()):
            yield Problem(f"{self._shown}/{MANIFEST}", "", "non-finite: the empty caption's embeddings")

    def _unfinished(self, whole: bool) -> Iterator[Problem]:
        folder = Path(self._folder)
        for name in self._samples:
            stats = f"{Path(name).stem}_stats.json"  # written last (`stack.preencode.writer`)
            if not (folder / stats).exists():
                yield Problem(str(folder / name), "", f"unfinished shard: no {stats}")
        if whole:
            for path in sorted(folder.glob(".*.tmp")):
                yield Problem(str(path), "", "temporary file: a writer was stopped, or is still at work")


def _name(url: str) -> str:
    return without_query(url).rpartition("/")[2]


# ---- the whole set


def _duplicates(urls: list[str], hashes: list[np.ndarray], cache: ShardCache | None) -> Iterator[Problem]:
    """Keys that an earlier shard has too."""
    everything = np.concatenate(hashes)
    order = np.argsort(everything, kind="stable")  # of equal ones the first stays first
    ordered = everything[order]
    repeated = np.append(False, ordered[1:] == ordered[:-1])[: len(order)]
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))
    starts = np.cumsum([0, *map(len, hashes)])
    index: ShardIndex | None = None
    for sample, original in sorted(zip(order[repeated].tolist(), order[first[repeated]].tolist(), strict=True)):
        number, other = (int(np.searchsorted(starts, each, side="right")) - 1 for each in (sample, original))
        if index is None or index.url != urls[number]:
            index = _index(urls[number], cache)
        key = index.key(sample - int(starts[number]))
        yield Problem(redact(urls[number]), key, f"duplicate key: also in {redact(urls[other])}")
