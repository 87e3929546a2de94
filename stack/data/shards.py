"""Shards, local or remote: find them, index them, read members by offset, and count their samples as one set."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from heapq import merge
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, Literal, NamedTuple
from zlib import crc32

import numpy as np

from stack.config import UserError, is_users, refusal
from stack.data import remote, safety
from stack.data.identity import Part
from stack.data.index import SUFFIX, ShardIndex, build_index, sha256_of, without_query
from stack.data.remote import ShardCache, Stat, is_compressed, is_remote
from stack.data.safety import MAX_CAPTION, MAX_TEXT, DecodeError, read_caption
from stack.data.tar import HEADER_BYTES, is_header_of
from stack.log import say
from stack.shown import redact

_PARALLEL_BYTES = 2**28  # shards to index of less in all are not worth starting processes for
_REQUESTS = 32  # to a store at once
_MAX_MAPPED = 256  # indices whose columns are mapped at once
_MAX_PATTERNS = 10**6  # that braces may expand to
_MAX_NAMED = 10  # changed shards that an error names
_SHOWN = 5  # files that a message names

# ---- finding shards


class Found(NamedTuple):
    """Paths or URLs, sorted. compressed: archives that cannot be read by offset, and are passed over."""

    shards: list[str]
    compressed: list[str]


def find_shards(source: str | Path) -> list[str]:
    """The shards of `find`."""
    return find(source).shards


def find(source: str | Path) -> Found:
    """The tars that `source` means, and the compressed archives among them.

    `source` is a folder of *.tar, one tar, a glob or a brace list ("train/{00000..00007}.tar", "{a,b}.tar"), local or
    under any URL that fsspec knows. Raises UserError where there is none.
    """
    text = str(source)
    safety.check_source(text)
    text = text.removeprefix("file://")
    found: set[str] = set()
    for pattern in [text] if os.path.exists(text) else _expand_braces(text):
        found.update(remote.list_shards(pattern) if is_remote(pattern) else _local_shards(pattern))
    compressed = sorted(filter(is_compressed, found))
    if len(compressed) == len(found):
        raise UserError(f"{redact(text)}: no plain .tar, but {describe_compressed(compressed)}")
    return Found(sorted(found.difference(compressed)), compressed)


def describe_compressed(urls: Sequence[str]) -> str:
    """A phrase that names compressed archives, and the remedy."""
    names = [without_query(url).rpartition("/")[2] for url in urls]
    listed = ", ".join([*names[:_SHOWN], *("…" for _ in range(len(names) > _SHOWN))])
    plural = "s are" if len(names) > 1 else " is"
    return f"{len(names):,} compressed archive{plural} not read ({listed}): unpack to plain .tar files"


def _local_shards(pattern: str) -> list[str]:
    _refuse_passing_error(pattern)
    if os.path.isdir(pattern):
        names = os.listdir(pattern)
        kept = [name for name in names if (name.endswith(".tar") and name[0] != ".") or is_compressed(name)]
        found = [os.path.join(pattern, name) for name in kept]
    else:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
    if not found:
        problem = "no *.tar in this folder" if os.path.isdir(pattern) else "no such folder or shard"
        raise UserError(f"{pattern}: {problem}")
    return found


def _refuse_passing_error(pattern: str) -> None:
    """Raise what `os.path` and `glob` would take for a missing file, where it may pass (EIO, ESTALE)."""
    plain = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    path = pattern if plain == pattern else plain.rpartition("/")[0] or "."
    try:
        if S_ISDIR(os.stat(path).st_mode):
            os.scandir(path).close()
    except OSError as error:
        if not is_users(error):
            raise


def _expand_braces(text: str) -> list[str]:
    """Raises UserError above `_MAX_PATTERNS`, before they fill the memory."""
    too_many = UserError(f"{redact(text)}: these braces mean more than {_MAX_PATTERNS:,} shards")
    if math.prod(len(_parts(match)) for match in _BRACES.finditer(text)) > _MAX_PATTERNS:
        raise too_many
    found: list[str] = []
    waiting = [text]
    while waiting:
        pattern = waiting.pop()
        match = _BRACES.search(pattern)
        if match is None:
            found.append(pattern)
            continue
        parts = _parts(match)
        if not parts:
            raise UserError(f"{redact(text)}: {match[0]} counts backwards")
        if len(found) + len(waiting) + len(parts) > _MAX_PATTERNS:  # of braces inside others
            raise too_many
        before, after, width = pattern[: match.start()], pattern[match.end() :], len(match[1] or "")
        waiting += [f"{before}{str(part).zfill(width)}{after}" for part in reversed(parts)]
    return found


_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def _parts(match: re.Match[str]) -> Sequence[object]:
    first, last, names = match.groups()
    return names.split(",") if names is not None else range(int(first), int(last) + 1)


# ---- indexing


def index_shards(
    source: str | Path,
    folder: Path | None = None,
    cache: ShardCache | None = None,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """Indices of all shards of `source` (see `find_shards`), sorted by path.

    An index is NNNNN.index.safetensors beside its shard, or in a subfolder of `folder` named after the shard's own; a
    remote shard's stands beside it, if it was stored there no earlier than the shard itself, or in the cache's folder.
    One that is missing is built, in parallel where that is worth it; each is kept as soon as it is built, so a stopped
    indexing goes on. A shard whose time or version alone is another (a copy, another mount) is read again: if its bytes
    are those that were indexed, its index is renewed. `rebuild` builds those anew whose shards have changed.
    `progress(done, total)` is called after each shard.

    Raises UserError where there is no shard, an index cannot be written into `folder`, or shards have changed since
    they were indexed; the error names them.
    """
    urls, compressed = find(source)
    if compressed:
        say(f"{redact(str(source))}: {describe_compressed(compressed)}")
    indices: dict[str, ShardIndex] = {}
    missing: list[_Work] = []
    changes: list[tuple[str, str]] = []
    for work, known in _look_up(urls, folder, cache, rebuild):
        if known is None:
            if work.change:
                changes.append((work.url, work.change))
            else:
                missing.append(work)
        else:
            indices[work.url] = known
            if progress is not None:
                progress(len(indices), len(urls))
    if num_outdated := sum(work.outdated for work in missing):
        of_others = (
            f"{num_outdated:,} of {len(urls):,} indices beside the shards may be of others that stood there before"
        )
        say(f"{redact(str(source))}: {of_others}; they are built anew: store an index after its shard")
    doubtful = [work.stat.size for work in missing if work.sha256]
    if sum(doubtful) >= _PARALLEL_BYTES:
        how = f"{len(doubtful):,} of {len(urls):,} shards have another time than when they were indexed"
        say(f"{redact(str(source))}: {how}; their content is compared, {sum(doubtful) / 1e9:.3g} GB")
    for work, index in zip(missing, _build_all(missing), strict=True):
        if index is None:
            changes.append((work.url, "other content of the same size"))
            continue
        indices[index.url] = index
        if progress is not None:
            progress(len(indices), len(urls))
    if len(changes) == 1:
        raise changed(*changes[0])
    if changes:
        raise _many_changed(str(source), sorted(changes))
    _refuse_other_formats(indices.values())
    return [indices[url] for url in urls]


def _refuse_other_formats(indices: Iterable[ShardIndex]) -> None:
    """UserError naming the shards that are no tars. No index is kept of them."""
    others = sorted(f"{redact(index.url)}: {index.damage}" for index in indices if not index.is_tar)
    if others:
        more = f" (and {len(others) - _SHOWN:,} more)" if len(others) > _SHOWN else ""
        raise UserError(f"{'; '.join(others[:_SHOWN])}{more}")


def _look_up(
    urls: list[str], folder: Path | None, cache: ShardCache | None, rebuild: bool
) -> Iterator[tuple[_Work, ShardIndex | None]]:
    """Each shard with the index that is there already; of remote ones many at a time, for the answers take long."""

    def look(url: str) -> tuple[_Work, ShardIndex | None]:
        work = _Work(url, folder, cache)
        return work, work.known(rebuild)

    if any(map(is_remote, urls)):
        with ThreadPoolExecutor(_REQUESTS) as threads:
            yield from threads.map(look, urls)
    else:
        yield from map(look, urls)


class _Work:
    """One shard whose index is wanted."""

    def __init__(self, url: str, folder: Path | None, cache: ShardCache | None) -> None:
        self.url, self.cache = url, cache
        self.outdated = False  # what lies beside the shard may be of another that stood there before
        self.sha256 = ""  # of the shard when it was indexed, if only its time or version is another now
        self.change = ""  # how the shard has changed since it was indexed
        self.must_write = folder is not None
        if is_remote(url):
            assert cache is not None, "a remote source needs a cache"
            self.stat = remote.stat(url)
            folder = folder or cache.dir / "index"
            parent = without_query(url).rpartition("/")[0]
        else:
            found = os.stat(url)
            if not S_ISREG(found.st_mode):  # a pipe would wait for its writer for ever
                raise UserError(f"{url}: not a regular file")
            self.stat = Stat(found.st_size, str(found.st_mtime_ns))
            parent = str(Path(url).parent.resolve())  # not what the shard links to: two links may share its name
        name = Path(without_query(url)).stem + SUFFIX
        if folder is None:
            self.path = Path(url).with_name(name)
        else:  # shards of two folders often share their names
            digest = hashlib.sha256(os.fsencode(parent)).hexdigest()[:8]
            self.path = folder / f"{parent.rpartition('/')[2]}-{digest}" / name

    def known(self, rebuild: bool) -> ShardIndex | None:
        """The index that is there, if it is the shard's; None where one has to be built, or `change` is set."""
        try:
            index = ShardIndex(self.url, self.path)
        except OSError as error:
            if not is_users(error):
                raise
            index = None
        except ValueError:  # another version's or a broken file: the shard tells it all again
            index = None
        if index is None:
            published = self._published()
            return None if published is None else self._keep(published)
        if Stat(index.size, index.version) == self.stat:
            return index
        if rebuild:
            return None
        if index.size != self.stat.size:
            self.change = f"{index.size:,} bytes when it was indexed, {self.stat.size:,} now"
            return None
        self.sha256 = index.sha256
        published = self._published()
        return self._keep(published) if published is not None and published.sha256 == index.sha256 else None

    def _published(self) -> ShardIndex | None:
        """The index that is stored beside a remote shard, if it was stored after the shard."""
        if not is_remote(self.url):
            return None
        path = without_query(self.url)
        beside = path.removesuffix(".tar") + SUFFIX + self.url[len(path) :]
        try:
            data = remote.read_bytes(beside, max_bytes=2**30)
        except PermissionError:  # what a store says of all it lacks, if it must not be listed
            return None
        try:
            index = ShardIndex(self.url, data) if data is not None else None
        except ValueError:
            return None
        if index is None or index.size != self.stat.size:
            return None
        shard_time, index_time = remote.modified(self.url), remote.modified(beside)
        if shard_time is None or index_time is None or index_time < shard_time:
            self.outdated = True
            return None
        return index.of_version(self.stat.version)

    def build(self) -> ShardIndex | None:
        """The shard's index, kept; None if the shard was indexed before with other content."""
        if self.cache is not None and is_remote(self.url):
            index = build_index(self.cache.fetch(self.url, self.stat), self.url, self.stat.version)
        else:
            index = build_index(self.url)
        return self._keep(index) if self.sha256 in ("", index.sha256) else None

    def _keep(self, index: ShardIndex) -> ShardIndex:
        """Save it. Local shards in a folder that cannot be written to are read all the same, indexed each time."""
        if not index.is_tar:  # it is refused: what is unpacked in its place has not "changed"
            return index
        try:
            index.save(self.path)
        except OSError as error:
            if self.must_write or is_remote(self.url):
                problem = f"index cannot be written ({error.strerror}); name another folder"
                raise refusal(error, f"{self.path}: {problem}") from None
        return index


def stored_index(url: str, folder: Path | None = None, cache: ShardCache | None = None) -> ShardIndex | None:
    """The index that `index_shards` kept of one shard, whether it still fits it or not; None if there is none."""
    try:
        return ShardIndex(url, _Work(url, folder, cache).path)
    except (OSError, ValueError):
        return None


def _build_all(works: Sequence[_Work]) -> Iterator[ShardIndex | None]:
    workers = min(len(works), len(os.sched_getaffinity(0)))
    if workers < 2 or sum(work.stat.size for work in works) < _PARALLEL_BYTES:
        yield from map(_Work.build, works)
        return
    # Forked: the builders touch files and Pillow only, and a spawned one would import the caller's main module again.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as processes:
        yield from processes.map(_Work.build, works)


def changed(url: str, how: str) -> UserError:
    where = redact(url)
    return UserError(
        f"{where}: the shard changed since it was indexed ({how}); index it again: mmdit data index {where}"
    )


def _many_changed(source: str, changes: Sequence[tuple[str, str]]) -> UserError:
    listed = "; ".join(f"{redact(url)} ({how})" for url, how in changes[:_MAX_NAMED])
    more = f"; and {len(changes) - _MAX_NAMED:,} more" if len(changes) > _MAX_NAMED else ""
    remedy = f"index them again: mmdit data index {redact(source)}"
    return UserError(f"{len(changes):,} shards changed since they were indexed: {listed}{more}; {remedy}")


# ---- reading


class ShardReader:
    """Reads members by offset. Files are opened on first use, at most `max_open` at once, anew in a forked process.

    A remote shard is fetched into `cache` first, and those that the cache has removed meanwhile are closed.
    """

    def __init__(self, indices: Sequence[ShardIndex], cache: ShardCache | None = None, max_open: int = 64) -> None:
        self.indices = indices
        self.cache = cache
        self.max_open = max_open
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._views: dict[int, memoryview] = {}
        self._proved: dict[int, str] = {}
        """Other versions of shards under which this process has found the bytes that were indexed."""
        self._process = os.getpid()

    def read(self, shard: int, row: int, extension: str, most: int | None = None) -> bytes:
        """The bytes of one member, or the first `most` of them; its name in the tar's own header is looked at.

        Raises KeyError if the sample has no such member, UserError if the shard is gone or not what was indexed.
        """
        index = self.indices[shard]
        offset, length = index.span(row, extension)
        wanted = HEADER_BYTES + (length if most is None else min(length, most))
        data = os.pread(self.handle(shard), wanted, max(0, offset - HEADER_BYTES))
        fits = is_header_of(data[:HEADER_BYTES], index.key(row), extension, length)
        if not fits or len(data) < wanted:
            raise self.cut(shard)
        return data[HEADER_BYTES:]

    def caption(self, shard: int, row: int) -> str | None:
        """KEY.txt, None if the sample has none. Raises DecodeError, and UserError as `read`."""
        if not self.indices[shard].has(row, "txt"):
            return None
        return read_caption(self.read(shard, row, "txt", MAX_CAPTION + 1))

    def fields(self, shard: int, row: int) -> dict[str, Any]:
        """KEY.json, empty if the sample has none or it is no object. Raises DecodeError, and UserError as `read`."""
        fields = self.json(shard, row)
        return fields if isinstance(fields, dict) else {}

    def json(self, shard: int, row: int) -> Any:
        """What KEY.json holds, an empty object if the sample has none. Raises DecodeError, and UserError as `read`."""
        index = self.indices[shard]
        if not index.has(row, "json"):
            return {}
        if index.span(row, "json")[1] > MAX_TEXT:
            raise DecodeError(f"JSON too large: more than {MAX_TEXT:,} bytes")
        try:
            return json.loads(self.read(shard, row, "json"))
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"JSON not readable: {' '.join(str(error).split())}") from None

    def handle(self, shard: int) -> int:
        """A file descriptor of the shard's tar, for reading by offset right away: a later call may close it."""
        if self._process != os.getpid():
            self.close()
            self._process = os.getpid()
        if shard not in self._files:
            while len(self._files) >= self.max_open:
                self._close(next(iter(self._files)))
            self._files[shard] = self._open(shard)
        self._files.move_to_end(shard)
        return self._files[shard].fileno()

    def view(self, shard: int) -> memoryview:
        """The whole tar, mapped into memory: copies from it are twice as fast as reads.

        Raises UserError if its size changed, for what lies behind the end of a mapped file cannot be touched.
        """
        size = os.fstat(self.handle(shard)).st_size
        if size != self.indices[shard].size:
            raise self.cut(shard)
        if shard not in self._views:
            self._views[shard] = memoryview(mmap.mmap(self.handle(shard), size, access=mmap.ACCESS_READ))
        return self._views[shard]

    def cut(self, shard: int) -> UserError:
        """What to raise where a member does not stand where it did."""
        index, size = self.indices[shard], os.fstat(self.handle(shard)).st_size
        if size == index.size:
            problem = "what stands in the shard is not what was indexed, though neither its size nor its time changed"
            return UserError(f"{redact(index.url)}: {problem}: restore it, remove its index and index it again")
        return changed(index.url, f"{index.size:,} bytes then, {size:,} now")

    def close(self) -> None:
        for shard in list(self._files):
            self._close(shard)

    def _close(self, shard: int) -> None:
        self._views.pop(shard, None)
        self._files.pop(shard).close()

    def _close_evicted(self) -> None:
        """Let go of what the cache has removed: its bytes are on the disk until then."""
        for shard, file in list(self._files.items()):
            if is_remote(self.indices[shard].url) and not os.fstat(file.fileno()).st_nlink:
                self._close(shard)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_views": {}}  # a spawned process opens its own

    def _open(self, shard: int) -> BinaryIO:
        index = self.indices[shard]
        if is_remote(index.url):
            assert self.cache is not None
            self._close_evicted()  # by others, before more is fetched
            file = self.cache.open(index.url, Stat(index.size, index.version))
            self._close_evicted()  # to make room for this one
            return file
        try:
            file = open(index.url, "rb")  # noqa: SIM115
        except OSError as error:
            raise refusal(error, f"{index.url}: shard cannot be opened: {error.strerror}") from None
        stat = os.fstat(file.fileno())
        version = str(stat.st_mtime_ns)
        if stat.st_size == index.size and version not in (index.version, self._proved.get(shard)):
            if sha256_of(file) == index.sha256:  # a copy of this node's own, or one that was touched meanwhile
                self._proved[shard] = version
            else:
                file.close()
                raise changed(index.url, "other content of the same size")
        elif stat.st_size != index.size:
            file.close()
            raise changed(index.url, f"{index.size:,} bytes then, {stat.st_size:,} now")
        return file


class ShardSet:
    """The samples of many shards under one global id, 0 … num_samples − 1, in the order of the shards.

    Columns of at most 256 shards are mapped at once, so memory does not grow with the set.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = list(indices)
        self.starts = np.array([0, *accumulate(map(len, self.indices))], np.int64)
        """First id of each shard, and the number of samples; int64 [shards + 1]."""
        self.num_samples = int(self.starts[-1])
        self._mapped: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return self.num_samples

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, whose columns may be mapped until the next calls."""
        self._mapped[shard] = None
        self._mapped.move_to_end(shard)
        while len(self._mapped) > _MAX_MAPPED:
            self.indices[self._mapped.popitem(last=False)[0]].release()
        return self.indices[shard]

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in its index). Raises IndexError."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def key(self, sample_id: int) -> str:
        shard, row = self.locate(sample_id)
        return self.index(shard).key(row)

    def lowest_hashes(self, count: int, below: int) -> np.ndarray:
        """Ids of the `count` samples whose keys have the lowest crc32, of those below a limit; sorted, int64."""

        def of(shard: int) -> Iterator[tuple[int, int]]:
            index = self.index(shard)
            for start in range(0, len(index), 16):
                rows = self.index(shard).by_hash[start : start + 16].tolist()
                for row in rows:
                    value = crc32(self.index(shard).key(row).encode("utf-8", "surrogateescape"))
                    if value >= below:
                        return
                    yield value, int(self.starts[shard]) + row

        lowest = islice(merge(*map(of, range(len(self.indices)))), count)
        return np.array(sorted(sample for _, sample in lowest), np.int64)

    def part(self, role: Literal["train", "paired"], weight: float | None) -> Part:
        """The shards as a part of the identity of a training's data."""
        names, contents = ([getattr(index, name) for index in self.indices] for name in ("name", "identity"))
        return Part(role=role, weight=weight, names=names, contents=contents)

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the shards and their digests: the manifest's source."""
        layout = [[index.name, index.size, index.digest] for index in self.indices]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def unique_names(indices: Iterable[ShardIndex]) -> None:
    """UserError where two shards have the same file name."""
    seen: dict[str, str] = {}
    for index in indices:
        if index.name in seen:
            both = f"{redact(seen[index.name])} and {redact(index.url)}"
            raise UserError(f"{both} have the same file name; encode their folders separately")
        seen[index.name] = index.url
