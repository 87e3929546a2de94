"""Shards on local disks: find them, index their samples, read members by offset.

A shard is a tar of samples in WebDataset's layout, KEY.EXTENSION, either raw (an image and its .txt) or pre-encoded
(.safetensors). Its index says where each member stands and how large the image and how long the caption is, so nobody
opens a tar again to plan an epoch. Samples are joined by key inside one shard, never by their order, so an image cannot
meet the caption of another sample, however the shard is damaged.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import socket
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stack.config import UserError
from stack.data import safety
from stack.data.images import image_size
from stack.data.safety import DecodeError, Rejected
from stack.data.tar import FILE, FOLDER, Member, read_headers

_FORMAT = 1  # of the saved index: raised when its meaning changes


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The usable samples of one shard, n of them, in the order of their first members.

    offsets, lengths: extension → int64 [n], bytes from the start of the tar; length −1 where a sample lacks the member.
    width, height: int32 [n]; upright pixels of a raw sample's image, cells of a pre-encoded one's latent.
    caption_length: int32 [n]; characters of a raw sample's caption, text tokens of a pre-encoded one.
    rejected: the samples left out, and why.  damage: what is wrong with the archive itself, "" if it is whole.
    """

    path: Path
    size: int
    mtime_ns: int
    keys: np.ndarray
    offsets: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    width: np.ndarray
    height: np.ndarray
    caption_length: np.ndarray
    rejected: list[Rejected]
    damage: str

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, row: int, extension: str) -> bool:
        return extension in self.lengths and bool(self.lengths[extension][row] >= 0)

    def image_extension(self, row: int) -> str:
        """Extension of the sample's image. Raises KeyError for a pre-encoded sample."""
        for extension in safety.IMAGE_EXTENSIONS:
            if self.has(row, extension):
                return extension
        raise KeyError(f"{self.path}: sample {self.keys[row]!r} has no image")

    def save(self, path: Path) -> None:
        """Write a compressed .npz without pickles, published by rename."""
        arrays: dict[str, Any] = {
            "header": np.array([_FORMAT, self.size, self.mtime_ns], np.int64),
            "keys": self.keys,
            "width": self.width,
            "height": self.height,
            "caption_length": self.caption_length,
            "rejected": np.array(json.dumps(self.rejected)),
            "damage": np.array(self.damage),
            **{f"offset.{extension}": offsets for extension, offsets in self.offsets.items()},
            **{f"length.{extension}": lengths for extension, lengths in self.lengths.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, shard: Path) -> ShardIndex:
        """Read the index of `shard` saved at `path`. Raises ValueError if it is no index of this format."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                form, size, mtime_ns = arrays["header"].tolist()
                if form != _FORMAT:
                    raise ValueError(f"{path}: index format {form}, expected {_FORMAT}")
                return cls(
                    path=shard,
                    size=size,
                    mtime_ns=mtime_ns,
                    keys=arrays["keys"],
                    offsets={name[7:]: arrays[name] for name in arrays if name.startswith("offset.")},
                    lengths={name[7:]: arrays[name] for name in arrays if name.startswith("length.")},
                    width=arrays["width"],
                    height=arrays["height"],
                    caption_length=arrays["caption_length"],
                    rejected=[Rejected(*pair) for pair in json.loads(arrays["rejected"].item())],
                    damage=arrays["damage"].item(),
                )
        except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a shard index: {error}") from error


# ---- building an index


def build_index(tar_path: str | Path) -> ShardIndex:
    """Index one shard. Damage and bad samples are reported in the result; only a missing file raises (OSError).

    The samples that stand whole before a cut stay usable. The one before the cut counts as whole if it has the same
    extensions as its predecessor.
    """
    path = Path(tar_path)
    with path.open("rb", buffering=2**20) as file:
        stat = os.fstat(file.fileno())
        members, damage = read_headers(file, stat.st_size)
        groups, reasons = _group(members)
        if damage and groups:
            *before, last = groups
            if not before or set(groups[last]) != set(groups[before[-1]]):
                reasons.setdefault(last, f"incomplete: shard {damage}")
        samples: dict[str, tuple[int, int, int]] = {}
        for key, group in groups.items():
            if key not in reasons:
                try:
                    samples[key] = _measure(file, group)
                except DecodeError as error:
                    reasons[key] = str(error)

    extensions = sorted({extension for key in samples for extension in groups[key]})
    offsets, lengths = (
        {
            extension: np.array([getattr(groups[key].get(extension, _ABSENT), field) for key in samples], np.int64)
            for extension in extensions
        }
        for field in ("offset", "size")
    )
    width, height, caption_length = np.array(list(samples.values()), np.int32).reshape(-1, 3).T.copy()
    return ShardIndex(
        path=path,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        keys=np.array(list(samples), np.str_),
        offsets=offsets,
        lengths=lengths,
        width=width,
        height=height,
        caption_length=caption_length,
        rejected=[Rejected(key, reason) for key, reason in reasons.items()],
        damage=damage,
    )


_ABSENT = Member("", -1, -1, "")


def _group(members: list[Member]) -> tuple[dict[str, dict[str, Member]], dict[str, str]]:
    """key → extension → member, and key → reason for the keys that must not be used."""
    groups: dict[str, dict[str, Member]] = {}
    reasons: dict[str, str] = {}
    previous = None
    for member in members:
        key, extension = safety.split_name(member.name)
        if member.kind == FOLDER or not extension or key.endswith("/") or not key:
            continue  # no sample's: a folder, a README, a hidden file
        if key in groups and key != previous:
            reasons.setdefault(key, f"interleaved key: {member.name} stands apart from the rest of its sample")
        group = groups.setdefault(key, {})
        if member.kind != FILE:
            reasons.setdefault(key, f"forbidden member: {member.name} is a {member.kind}")
        elif refusal := safety.refuse_name(member.name):
            reasons.setdefault(key, refusal)
        elif extension in group:
            reasons.setdefault(key, f"duplicate member: {member.name}")
        group.setdefault(extension, member)
        previous = key
    return groups, reasons


def _measure(file: BinaryIO, group: dict[str, Member]) -> tuple[int, int, int]:
    """(width, height, caption length) of one sample as `ShardIndex` tells them. Raises DecodeError."""

    def read(member: Member, start: int = 0, length: int | None = None) -> bytes:
        file.seek(member.offset + start)
        return file.read(member.size if length is None else min(length, member.size))

    if encoded := group.get("safetensors"):
        head_size = safety.safetensors_header_size(read(encoded, length=8))
        shapes = safety.read_safetensors_shapes(read(encoded, length=head_size), encoded.size)
        latent = shapes.get("latent_mean", (0, 0, 0))
        if len(latent) != 3:
            raise DecodeError(f"safetensors not readable: latent_mean has shape {latent}, expected (C, h, w)")
        _, height, width = latent
        return width, height, max((shape[0] for shape in shapes.values() if len(shape) == 2), default=0)
    image = next((group[extension] for extension in safety.IMAGE_EXTENSIONS if extension in group), None)
    if image is None:
        others = ", ".join(f".{extension}" for extension in sorted(group))
        raise DecodeError(f"no image: only {others} (a key ends at the first dot of the name)")
    if "txt" not in group:
        raise DecodeError("no caption")
    caption = safety.read_caption(read(group["txt"]))
    return *image_size(read(image)), len(caption)


# ---- finding shards


def index_shards(
    source: str | Path, cache: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> list[ShardIndex]:
    """Indices of all shards of `source`, sorted by path.

    `source` is a folder of *.tar, one tar, a glob or a brace list ("train/{00000..00007}.tar", "{a,b}.tar"). An index
    is NNNNN.index.npz beside its shard, or in a subfolder of `cache` named after the shard's folder; one whose shard
    has another size or time of change is built again. `progress(done, total)` is called after each shard.

    Raises UserError where there is no shard, or an index cannot be written into `cache`.
    """
    paths = find_shards(source)
    indices = []
    for done, path in enumerate(paths, 1):
        indices.append(_load_or_build(path, _index_path(path, cache), cache is not None))
        if progress is not None:
            progress(done, len(paths))
    return indices


def find_shards(source: str | Path) -> list[Path]:
    """The local tars that `source` means (see `index_shards`), sorted. Raises UserError where there is none."""
    text = str(source)
    safety.check_source(text)
    if "://" in text:
        raise UserError(f"{text}: only local shards can be read; copy them and name the folder")
    paths: set[str] = set()
    for pattern in [text] if os.path.exists(text) else _expand_braces(text):
        if os.path.isdir(pattern):
            found = glob.glob(os.path.join(glob.escape(pattern), "*.tar"))
        else:
            found = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
        if not found:
            problem = "no *.tar in this folder" if os.path.isdir(pattern) else "no such folder or shard"
            raise UserError(f"{pattern}: {problem}")
        paths.update(found)
    return [Path(path) for path in sorted(paths)]


def _expand_braces(text: str) -> list[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    first, last, names = match.groups()
    if names is None:
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = names.split(",")
    return [whole for part in parts for whole in _expand_braces(text[: match.start()] + part + text[match.end() :])]


def _index_path(shard: Path, cache: Path | None) -> Path:
    name = f"{shard.stem}.index.npz"
    if cache is None:
        return shard.with_name(name)
    folder = shard.resolve().parent  # shards of two folders often share their names
    return cache / f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}" / name


def _load_or_build(shard: Path, index_path: Path, cache_was_named: bool) -> ShardIndex:
    """A folder of shards that cannot be written to is read all the same, its index built each time."""
    if index_path.exists():
        try:
            index = ShardIndex.load(index_path, shard)
        except ValueError:
            pass  # another version's or a broken file: the shard tells it all again
        else:
            stat = shard.stat()
            if (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return index
    index = build_index(shard)
    try:
        index.save(index_path)
    except OSError as error:
        if cache_was_named:
            raise UserError(f"{index_path}: index cannot be written ({error.strerror}); name another folder") from None
    return index


# ---- reading


class ShardReader:
    """Reads members by offset. Files are opened on first use, at most `max_open` at once, anew in a forked process."""

    def __init__(self, indices: Sequence[ShardIndex], max_open: int = 64) -> None:
        self.indices = indices
        self.max_open = max_open
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._process = os.getpid()

    def read(self, shard: int, row: int, extension: str) -> bytes:
        """The bytes of one member.

        Raises KeyError if the sample has no such member, UserError if the shard is gone or not what was indexed.
        """
        index = self.indices[shard]
        if not index.has(row, extension):
            raise KeyError(f"{index.path}: sample {index.keys[row]!r} has no .{extension}")
        length = int(index.lengths[extension][row])
        data = os.pread(self._file(shard).fileno(), length, int(index.offsets[extension][row]))
        if len(data) < length:
            raise _changed(index, os.stat(index.path).st_size)
        return data

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}  # a spawned process opens its own

    def _file(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():
            self.close()
            self._process = os.getpid()
        if shard not in self._files:
            while len(self._files) >= self.max_open:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = _open_checked(self.indices[shard])
        self._files.move_to_end(shard)
        return self._files[shard]


def _open_checked(index: ShardIndex) -> BinaryIO:
    try:
        file = index.path.open("rb")
    except OSError as error:
        raise UserError(f"{index.path}: shard cannot be opened: {error.strerror}") from None
    size = os.fstat(file.fileno()).st_size
    if size != index.size:
        file.close()
        raise _changed(index, size)
    return file


def _changed(index: ShardIndex, size: int) -> UserError:
    return UserError(f"{index.path}: shard has {size} bytes, its index says {index.size}; index it again")


class ShardSet:
    """The samples of many shards under one global id, 0 … num_samples − 1, in the order of the shards.

    width, height, caption_length: int32 [num_samples], as in `ShardIndex`.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = list(indices)
        self._starts = np.array([0, *accumulate(map(len, self.indices))], np.int64)
        self.num_samples = int(self._starts[-1])
        empty = np.empty(0, np.int32)
        self.width = np.concatenate([empty, *(index.width for index in self.indices)])
        self.height = np.concatenate([empty, *(index.height for index in self.indices)])
        self.caption_length = np.concatenate([empty, *(index.caption_length for index in self.indices)])

    def __len__(self) -> int:
        return self.num_samples

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in its index). Raises IndexError."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        shard = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self._starts[shard])

    def key(self, sample_id: int) -> str:
        shard, row = self.locate(sample_id)
        return str(self.indices[shard].keys[row])

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the shards, keys and where the members stand: the manifest's source."""
        digest = hashlib.sha256()
        for index in self.indices:
            layout = [index.path.name, index.size, index.keys.tolist(), sorted(index.offsets)]
            digest.update(json.dumps(layout).encode())
            for extension in sorted(index.offsets):
                digest.update(index.offsets[extension].astype("<i8").tobytes())
                digest.update(index.lengths[extension].astype("<i8").tobytes())
        return digest.hexdigest()
