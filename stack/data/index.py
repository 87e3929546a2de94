"""The index of one shard: where each member stands, how large the image and how long the captions are.

A shard is a tar of samples in WebDataset's layout, KEY.EXTENSION, either raw (an image, mostly with its .txt) or
pre-encoded (.safetensors). With its index nobody opens the tar again to plan an epoch. Samples are joined by key inside
one shard, never by their order, so an image cannot meet the caption of another sample, however the shard is damaged.

The file is a safetensors of columns, which can be mapped into memory and cannot run code; an .npz can only be read as a
whole. Its header alone tells counts and sizes, so ten thousand shards are planned without reading their columns.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stack.config import UserError
from stack.data import layout, mlperf, png, safety
from stack.data.images import image_size
from stack.data.members import MAX_MEMBER, READ, further_images, group
from stack.data.safety import DecodeError, Rejected, TooLarge
from stack.data.tar import FILE, HEADER_BYTES, NOT_A_TAR, Member, read_headers
from stack.files import publish
from stack.shown import redact

SUFFIX = ".index.safetensors"
_FORMAT = 5  # of the saved index: raised when its meaning changes
_MAX_SIZES = 256  # distinct sizes that are counted in the header; photographs have too many
_ABSENT = 2**32 - 1  # length of a member that a sample lacks
_SHOWN = 10  # names of members that belong to no sample, or kinds of further images, that an index keeps
_MAX_IMAGE_HEADER = 2**24  # bytes before the pixels, or beside what they take without compression
_DTYPES: dict[str, np.dtype] = {"U8": np.dtype("u1"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4")}


def without_query(url: str) -> str:
    """What names a shard: a path, or a URL as far as its query."""
    return url.partition("?")[0] if "://" in url else url


class ShardIndex:
    """The usable samples of one shard, n of them, in the order of their first members.

    url: path or URL of the shard.  size: its bytes.  version: changes when it is written again (a local file's time of
    change in nanoseconds; what a store says, see `stack.data.remote.Stat`).
    width, height: int32 [n]; upright pixels of a raw sample's image, cells of a pre-encoded one's latent.
    caption_length: int32 [n, captions]; characters of a raw sample's caption, text tokens of a pre-encoded one's
    captions, −1 for a caption that a sample lacks, or that cannot be used.
    by_hash: uint32 [n]; rows by the crc32 of their keys.
    sizes: (width, height) → samples, None if there are too many different ones.
    digest: sha256 of keys, captions and where the members stand.  sha256: of the shard's file.
    identity: sha256 of the file's bytes and of what the batch plan takes from them: keys, sizes, caption lengths. Equal
    shards have the same one, whatever their names, places and times.
    rejected: the samples left out, and why.  bad_captions: row → what is wrong with its KEY.txt, whose image is usable.
    damage: what is wrong with the archive itself, "" if it is whole.
    num_strays, strays: members that belong to no sample, and the first of their names.  further_images: (extension that
    is read, one beside it that is not, samples), the most frequent first.

    Columns are mapped when they are asked for, until `release`. Raises ValueError for a file that is no such index.
    """

    def __init__(self, url: str, source: Path | bytes) -> None:
        self.url = url
        self._source = source
        self._buffer: mmap.mmap | bytes | None = source if isinstance(source, bytes) else None
        self._arrays: dict[str, np.ndarray] = {}
        try:
            if isinstance(source, bytes):
                head, size, stop = source, len(source), layout.header_bytes(source)
            else:
                with source.open("rb") as file:
                    head, size = file.read(layout.HEAD_BYTES), os.fstat(file.fileno()).st_size
                    stop = layout.header_bytes(head)
                    head += file.read(max(0, stop - len(head)))
            entries = json.loads(head[8:stop])
            facts = json.loads(entries.pop("__metadata__")["index"])
            if facts["format"] != _FORMAT:
                raise ValueError(f"format {facts['format']}, expected {_FORMAT}")
            if facts.pop("crc32") != _check_sum(entries, facts):
                raise ValueError("wrong check sum")
            self._columns = _read_columns(entries, stop, size)
            self.size = int(facts["size"])
            self.version, self.digest = str(facts["version"]), str(facts["digest"])
            self.sha256, self.damage = str(facts["sha256"]), str(facts["damage"])
            self.identity = str(facts["identity"])
            self.num_strays, self.strays = int(facts["num_strays"]), list(map(str, facts["strays"]))
            self.further_images = [(str(read), str(other), int(count)) for read, other, count in facts["further"]]
            most_kept, least_refused = facts["pixels"]
            if not most_kept <= safety.max_pixels() < (least_refused or math.inf):
                raise ValueError("built with another MMDIT_MAX_PIXELS")
            sizes = facts["sizes"]
            self.sizes = None if sizes is None else {(int(w), int(h)): int(count) for w, h, count in sizes}
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
            where = redact(url) if isinstance(source, bytes) else source
            raise ValueError(f"{where}: not a shard index: {error}") from None
        self._rejected: list[Rejected] | None = None
        self._bad_captions: dict[int, str] | None = None
        self.extensions = sorted(name[7:] for name in self._columns if name.startswith("length."))

    def __len__(self) -> int:
        return int(self._columns["width"][1][0])

    @property
    def name(self) -> str:
        return without_query(self.url).rpartition("/")[2]

    @property
    def encoded(self) -> bool:
        """Whether the shard holds pre-encoded samples."""
        return "safetensors" in self.extensions

    @property
    def rejected(self) -> list[Rejected]:
        if self._rejected is None:
            self._rejected = [Rejected(*pair) for pair in self._listed("rejected")]
        return self._rejected

    @property
    def bad_captions(self) -> dict[int, str]:
        if self._bad_captions is None:
            self._bad_captions = dict(self._listed("bad_captions"))
        return self._bad_captions

    @property
    def is_tar(self) -> bool:
        """Whether the file is a tar, damaged or not, and no compressed one or another kind of file."""
        return not self.damage.startswith(NOT_A_TAR)

    @property
    def passed_over(self) -> list[str]:
        """A line for each kind of member that is never read."""
        lines = []
        if self.num_strays:
            names = ", ".join([*self.strays, *("…" for _ in range(self.num_strays > len(self.strays)))])
            lines.append(f"not read: files of no sample: {self.num_strays:,} ({names})")
        further = self.further_images
        return [*lines, *(f"not read: {count:,} × .{other} beside .{read}" for read, other, count in further)]

    @property
    def width(self) -> np.ndarray:
        return self._column("width")

    @property
    def height(self) -> np.ndarray:
        return self._column("height")

    @property
    def caption_length(self) -> np.ndarray:
        return self._column("caption_length")

    @property
    def by_hash(self) -> np.ndarray:
        return self._column("by_hash")

    @property
    def keys(self) -> list[str]:
        return [self.key(row) for row in range(len(self))]

    def key(self, row: int) -> str:
        return self.key_bytes(row).decode("utf-8", "surrogateescape")

    def key_bytes(self, row: int) -> bytes:
        """The key as it stands in the tar."""
        if not 0 <= row < len(self):  # told by a column of a damaged file
            raise UserError(f"{self._source!s}: this index is damaged: remove it, and index the shard again")
        starts = self._column("key.start")
        return self._column("key.bytes")[starts[row] : starts[row + 1]].tobytes()

    def has(self, row: int, extension: str) -> bool:
        return f"length.{extension}" in self._columns and bool(self._column(f"length.{extension}")[row] != _ABSENT)

    def span(self, row: int, extension: str) -> tuple[int, int]:
        """(offset from the start of the tar, length) in bytes of one member. Raises KeyError if the sample lacks it."""
        if not self.has(row, extension):
            raise KeyError(f"{redact(self.url)}: sample {self.key(row)!r} has no .{extension}")
        offset, length = self._column(f"offset.{extension}"), self._column(f"length.{extension}")
        return int(offset[row]) * HEADER_BYTES, int(length[row])

    def lengths(self, extension: str) -> np.ndarray:
        """Bytes of this member in each sample that has it; uint32."""
        length = self._column(f"length.{extension}")
        return length[length != _ABSENT]

    def image_extension(self, row: int) -> str:
        """Extension of the sample's image. Raises KeyError for a pre-encoded sample."""
        for extension in safety.IMAGE_EXTENSIONS:
            if self.has(row, extension):
                return extension
        raise KeyError(f"{redact(self.url)}: sample {self.key(row)!r} has no image")

    def release(self) -> None:
        """Let go of the mapped columns; they are mapped anew when asked for."""
        self._arrays.clear()
        if isinstance(self._source, Path):
            self._buffer = None

    def save(self, path: Path) -> None:
        """Write the index, published by rename; from here on it is mapped from there."""
        with publish(path) as temporary:
            temporary.write_bytes(bytes(self._mapped()))
        self._source = path
        self.release()

    def of_version(self, version: str) -> ShardIndex:
        """The same index for a copy of the shard that goes by another version."""
        data = bytes(self._mapped())
        facts = json.loads(json.loads(data[8 : layout.header_bytes(data)])["__metadata__"]["index"])
        return ShardIndex(self.url, _with_facts(data, {**facts, "version": version}))

    def _listed(self, name: str) -> list[Any]:
        """The JSON list in a column."""
        mapped = self._buffer is not None
        data = self._column(name).tobytes()
        if not mapped:
            self.release()
        return json.loads(data) if data else []

    def _column(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            dtype, shape, start = self._columns[name]
            self._arrays[name] = np.ndarray(shape, dtype, self._mapped(), start)
        return self._arrays[name]

    def _mapped(self) -> mmap.mmap | bytes:
        if self._buffer is None:
            assert isinstance(self._source, Path)
            with self._source.open("rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._buffer

    def __getstate__(self) -> dict[str, Any]:
        mapped = self._source if isinstance(self._source, bytes) else None
        return {**self.__dict__, "_buffer": mapped, "_arrays": {}}


def _read_columns(entries: dict[str, Any], start: int, size: int) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """name → (dtype, shape, first byte) of the columns of an index file of `size` bytes, whose header has `start`.

    Raises ValueError, KeyError or TypeError where they cannot be mapped from it.
    """
    columns, end = {}, start
    for name, entry in entries.items():
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), entry["data_offsets"]
        if len(shape) > 2 or min(first, *shape) < 0 or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"column {name} of shape {list(shape[:3])}")
        columns[name] = (dtype, shape, start + first)
        end = max(end, start + last)
    if size != end:
        raise ValueError("cut off")
    (count,) = columns["width"][1]
    shapes = {"key.start": (count + 1,), "caption_length": (count, columns["caption_length"][1][-1])}
    texts = ("key.bytes", "rejected", "bad_captions")
    for name in ("height", "by_hash", "key.start", *texts, *columns):
        shape = columns[name][1]
        if shape != shapes.get(name, (count,)) and not (name in texts and len(shape) == 1):
            raise ValueError(f"column {name} of shape {list(shape)} for {count} samples")
    return columns


# ---- building


def build_index(path: str | Path, url: str | None = None, version: str | None = None) -> ShardIndex:
    """Index the shard at `path`, a copy of `url` in `version` if these are given.

    Damage and bad samples are reported in the result; only a missing file raises (OSError). The samples that stand
    whole before a cut stay usable. The one before the cut counts as whole if it has the same extensions as its
    predecessor.
    """
    with open(path, "rb", buffering=2**20) as file:
        stat = os.fstat(file.fileno())
        members, damage, complete = read_headers(file, stat.st_size)
        groups, reasons, strays = group(members)
        if damage and not complete and groups:
            *before, last = groups
            if not before or set(groups[last]) != set(groups[before[-1]]):
                reasons.setdefault(last, f"incomplete: shard {damage}")
        digest = hashlib.sha256()
        samples: dict[str, tuple[int, int, list[int]]] = {}
        bad_captions: dict[int, str] = {}
        most_kept, least_refused = 0, None  # what MMDIT_MAX_PIXELS has to allow, and must not, for this index to hold
        for key, own in groups.items():
            if key not in reasons:
                try:
                    width, height, lengths, content, bad_caption = _measure(file, own)
                except DecodeError as error:
                    reasons[key] = str(error)
                    if isinstance(error, TooLarge):
                        least_refused = min(error.needed, least_refused or error.needed)
                    continue
                if bad_caption:
                    bad_captions[len(samples)] = bad_caption
                if (image := _image(own)) is not None:
                    most_kept = max(most_kept, width * height, image.size)
                samples[key] = (width, height, lengths)
                spans = [(extension, member.offset, member.size) for extension, member in sorted(own.items())]
                digest.update(json.dumps([key, spans]).encode() + content)
        sha256 = sha256_of(file)
    used = {key: groups[key] for key in samples}
    further = further_images(list(used.values())).most_common(_SHOWN)
    facts = {
        "size": stat.st_size,
        "version": str(stat.st_mtime_ns) if version is None else version,
        "digest": digest.hexdigest(),
        "sha256": sha256,
        "damage": damage,
        "pixels": [most_kept, least_refused],
        "rejected": list(reasons.items()),
        "bad_captions": list(bad_captions.items()),
        "num_strays": len(strays),
        "strays": list(map(safety.cut, strays[:_SHOWN])),
        "further": [[read, safety.cut(other), count] for (read, other), count in further],
    }
    return ShardIndex(str(path) if url is None else url, _serialize(facts, used, samples))


def _serialize(
    facts: dict[str, Any], groups: dict[str, dict[str, Member]], samples: dict[str, tuple[int, int, list[int]]]
) -> bytes:
    from safetensors.numpy import save

    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    hashes = np.array([zlib.crc32(key) for key in keys], np.uint32)
    sizes = Counter((width, height) for width, height, _ in samples.values())
    captions = max((len(lengths) for *_, lengths in samples.values()), default=1)
    caption_length = np.full((len(samples), captions), -1, np.int32)
    for row, (*_, lengths) in enumerate(samples.values()):
        caption_length[row, : len(lengths)] = lengths
    columns: dict[str, np.ndarray] = {
        "key.bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key.start": np.cumsum([0, *map(len, keys)], dtype=np.uint32),
        "width": np.array([width for width, _, _ in samples.values()], np.int32),
        "height": np.array([height for _, height, _ in samples.values()], np.int32),
        "caption_length": caption_length,
        "by_hash": np.argsort(hashes, kind="stable").astype(np.uint32),
    }
    identity = hashlib.sha256(facts["sha256"].encode())
    for name in ("key.bytes", "key.start", "width", "height", "caption_length"):
        identity.update(columns[name].tobytes())
    for extension in sorted(READ & {extension for own in groups.values() for extension in own}):
        members = [m if (m := own.get(extension)) and _readable(m) else None for own in groups.values()]
        columns[f"offset.{extension}"] = np.array([m.offset // HEADER_BYTES if m else 0 for m in members], np.uint32)
        columns[f"length.{extension}"] = np.array([m.size if m else _ABSENT for m in members], np.uint32)
    rejected = [[safety.cut(key), safety.cut(reason)] for key, reason in facts.pop("rejected")]
    for name, listed in (("rejected", rejected), ("bad_captions", facts.pop("bad_captions"))):
        columns[name] = np.frombuffer(json.dumps(listed).encode() if listed else b"", np.uint8)
    counts = [[*size, count] for size, count in sizes.items()] if len(sizes) <= _MAX_SIZES else None
    facts |= {"format": _FORMAT, "identity": identity.hexdigest(), "sizes": counts}
    return _with_facts(save(columns), facts)


def _readable(member: Member) -> bool:
    return member.kind == FILE and member.size <= MAX_MEMBER


def _with_facts(data: bytes, facts: dict[str, Any]) -> bytes:
    """An index file of the columns in `data`, a safetensors file, and these facts."""
    stop = layout.header_bytes(data)
    entries = json.loads(data[8:stop])
    entries.pop("__metadata__", None)
    facts = {name: value for name, value in facts.items() if name != "crc32"}
    facts["crc32"] = _check_sum(entries, facts)
    header = json.dumps({**entries, "__metadata__": {"index": json.dumps(facts)}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[stop:]


def _check_sum(entries: dict[str, Any], facts: dict[str, Any]) -> int:
    """Of an index file's header. Its columns have none: ten thousand of them are opened without being read."""
    return zlib.crc32(json.dumps([entries, facts], sort_keys=True).encode())


def sha256_of(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(2**22):
        digest.update(piece)
    return digest.hexdigest()


def _measure(file: BinaryIO, group: dict[str, Member]) -> tuple[int, int, list[int], bytes, str]:
    """(width, height, caption lengths) of one sample as `ShardIndex` tells them, what of its content its digest covers,
    and what is wrong with its KEY.txt, which only those who read it are concerned with. Raises DecodeError."""

    def read(member: Member, start: int = 0, length: int | None = None) -> bytes:
        file.seek(member.offset + start)
        return file.read(member.size - start if length is None else max(0, min(length, member.size - start)))

    if encoded := group.get("safetensors"):
        head = read(encoded, length=8)
        header = head + read(encoded, 8, layout.header_bytes(head) - 8)
        found = layout.parse(header)
        if found.size != encoded.size:
            raise DecodeError(
                f"safetensors not readable: header tells of {found.size} bytes, the member has {encoded.size}"
            )
        return *found.latent, found.caption_lengths, header, ""
    if any(extension in group for extension in mlperf.EXTENSIONS):
        side = mlperf.FACTOR * mlperf.measure({extension: member.size for extension, member in group.items()})
        return side, side, [mlperf.TOKENS], b"", ""
    image = _image(group)
    if image is None:
        others = ", ".join(f".{extension}" for extension in sorted(group))
        raise DecodeError(f"no image: only {others} (a key ends at the first dot of the name)")
    if image.size > safety.max_pixels():
        raise TooLarge(f"{image.size:,} bytes", image.size)
    text, content, length, bad_caption = group.get("txt"), b"", -1, ""
    if text is not None:
        content = read(text, length=safety.MAX_CAPTION + 1)
        try:
            if text.kind != FILE:
                raise DecodeError(f"caption not a file: {text.name} is a {text.kind}")
            length = len(safety.read_caption(content))
        except DecodeError as error:
            bad_caption = safety.cut(str(error))
    # Through a window: Pillow reads no further than the header, and the pixels are most of a shard.
    most = _most_of_header(read(image, length=12), image.size)
    width, height = image_size(io.BufferedReader(_Window(file, image, most), 2**14))
    if image.size > 8 * width * height + _MAX_IMAGE_HEADER:
        raise DecodeError(f"image too large: {image.size:,} bytes for {width}×{height} pixels")
    return width, height, [length], content, bad_caption


def _image(group: dict[str, Member]) -> Member | None:
    """The member that is read as a sample's image."""
    return next((group[extension] for extension in safety.IMAGE_EXTENSIONS if extension in group), None)


def _most_of_header(magic: bytes, size: int) -> int:
    """Bytes that are read of an image before its pixels: a WebP is read as a whole, and in a PNG the pixels are skipped
    to find what is behind them."""
    whole = magic.startswith(png.MAGIC) or (magic[:4] == b"RIFF" and magic[8:] == b"WEBP")
    return size if whole else _MAX_IMAGE_HEADER


class _Window(io.RawIOBase):
    """A member of an open tar as a file of its own, of which at most `most` bytes are read."""

    def __init__(self, file: BinaryIO, member: Member, most: int) -> None:
        self._file, self._start, self._size, self._at = file, member.offset, member.size, 0
        self._left = most

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) if len(view) else 0  # type: ignore[attr-defined]
        self._at += count
        self._left -= count
        if self._left < 0:
            raise ValueError("too much before the pixels")
        return count
