"""Shards, local or remote: find them, index them, read members by offset, and count their samples as one set."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, TypeVar

import numpy as np

from stack.config import UserError, is_users, refusal
from stack.data import remote
from stack.data.index import SUFFIX, ShardIndex, build_index, sha256_of, without_query
from stack.data.remote import ShardCache, Stat, is_remote
from stack.data.safety import MAX_CAPTION, MAX_TEXT, DecodeError, read_caption
from stack.data.samples import ShardSet as ShardSet
from stack.data.sources import describe_compressed, find
from stack.data.table import Rows, ShardTable
from stack.data.tar import HEADER_BYTES, NOT_A_TAR, is_header_of
from stack.log import say
from stack.shown import redact

_PARALLEL_BYTES = 2**28  # shards to index of less in all are not worth starting processes for
_REQUESTS = 32  # to a store at once
_TRIED = 16  # calls, after which is decided whether many are made at a time
_SLOW_S = 5e-4  # for one call on the mean: so slow is a network, not a disk
_PIECE = 1024  # indices that are opened before their facts are put together
_MIN_TABLE = 64  # shards of one folder that a table is worth its while for
_MAX_NAMED = 10  # changed shards that an error names
_SHOWN = 5  # files that a message names

T = TypeVar("T")
V = TypeVar("V")

# ---- indexing


def index_shards(
    source: str | Path,
    folder: Path | None = None,
    cache: ShardCache | None = None,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardTable:
    """Indices of all shards of `source` (see `stack.data.sources`), sorted by path.

    An index is NNNNN.index.safetensors beside its shard, or in a subfolder of `folder` named after the shard's own; a
    remote shard's stands beside it, if it was stored there no earlier than the shard itself, or in the cache's folder.
    One that is missing is built, in parallel where that is worth it; each is kept as soon as it is built, so a stopped
    indexing goes on. A shard whose time or version alone is another (a copy, another mount) is read again: if its bytes
    are those that were indexed, its index is renewed. `rebuild` builds those anew whose shards have changed.
    `progress(done, total)` is called after each shard. Of many shards a table in the folder of the indices keeps what a
    start needs (`stack.data.table`), so their indices are not opened.

    Raises UserError where there is no shard, an index cannot be written into `folder`, or shards have changed since
    they were indexed; the error names them.
    """
    urls, compressed = find(source)
    if compressed:
        say(f"{redact(str(source))}: {describe_compressed(compressed)}")
    places = _Places(folder, cache)
    stats = _each(_stat, urls)
    known, positions = ([], []) if rebuild else _tabled(urls, stats, places)
    left = np.setdiff1d(np.arange(len(urls)), positions).tolist()
    held: dict[int, ShardIndex] = {}
    missing: list[tuple[int, _Work]] = []
    changes: list[tuple[str, str]] = []

    def taken(found: Iterable[tuple[int, ShardIndex]]) -> Iterator[ShardIndex]:
        for number, index in found:
            positions.append(number)
            if index.in_memory:
                held[number] = index
            if progress is not None:
                progress(len(positions), len(urls))
            yield index

    for at in range(0, len(left), _PIECE):  # memory holds so many indices, not all
        works = [(number, _Work(urls[number], stats[number], places)) for number in left[at : at + _PIECE]]
        looked = _each(lambda pair: pair[1].known(rebuild), works)
        known.append(
            Rows.of(taken((n, index) for (n, _), index in zip(works, looked, strict=True) if index is not None))
        )
        for (number, work), index in zip(works, looked, strict=True):
            if work.change:
                changes.append((work.url, work.change))
            elif index is None:
                missing.append((number, work))
    _say_what_is_built(source, len(urls), [work for _, work in missing])
    built = zip(missing, _build_all([work for _, work in missing]), strict=True)

    def fitting() -> Iterator[tuple[int, ShardIndex]]:
        for (number, work), index in built:
            if index is None:
                changes.append((work.url, "other content of the same size"))
            else:
                yield number, index

    known.append(Rows.of(taken(fitting())))
    if len(changes) == 1:
        raise changed(*changes[0])
    if changes:
        raise _many_changed(str(source), sorted(changes))
    rows = Rows.joined(known).take(np.argsort(positions, kind="stable"))
    _refuse_other_formats(urls, rows)
    if len(left) >= _MIN_TABLE:
        _keep_table(urls, rows, places)
    return ShardTable(urls, rows, partial(_load, places=places), held)


def _refuse_other_formats(urls: Sequence[str], rows: Rows) -> None:
    """UserError naming the shards that are no tars. No index is kept of them."""
    damages = [kind.damage for kind in rows.kinds]
    others = [kind for kind, damage in enumerate(damages) if damage.startswith(NOT_A_TAR)]
    numbers = np.flatnonzero(np.isin(rows.columns["kind"], others)).tolist()
    if numbers:
        named = [f"{redact(urls[n])}: {damages[rows.columns['kind'][n]]}" for n in numbers[:_SHOWN]]
        more = f" (and {len(numbers) - _SHOWN:,} more)" if len(numbers) > _SHOWN else ""
        raise UserError(f"{'; '.join(named)}{more}")


def _each(call: Callable[[T], V], items: Sequence[T]) -> list[V]:
    """`call` of each item, in order; many at a time where the first ones take long, as on a network."""
    began = time.perf_counter()
    results = [call(item) for item in items[:_TRIED]]
    size = max(1, min(_PIECE, len(items) // (8 * _REQUESTS)))
    pieces = [items[at : at + size] for at in range(_TRIED, len(items), size)]

    def all_of(piece: Sequence[T]) -> list[V]:
        return [call(item) for item in piece]

    if time.perf_counter() - began < _SLOW_S * len(results):
        return [*results, *chain.from_iterable(map(all_of, pieces))]
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return [*results, *chain.from_iterable(threads.map(all_of, pieces))]


def _stat(url: str) -> Stat:
    if "://" in url and is_remote(url):
        return remote.stat(url)
    found = os.stat(url)
    if not S_ISREG(found.st_mode):  # a pipe would wait for its writer for ever
        raise UserError(f"{url}: not a regular file")
    return Stat(found.st_size, str(found.st_mtime_ns))


class _Places:
    """Where the indices of shards are kept."""

    def __init__(self, folder: Path | None, cache: ShardCache | None) -> None:
        self.cache, self.must_write = cache, folder is not None
        self._folder = folder
        self._known: dict[str, Path] = {}

    def folder(self, url: str) -> Path:
        """The folder of a shard's index."""
        parent = without_query(url).rpartition("/")[0]
        if parent not in self._known:
            self._known[parent] = self._folder_of(url, parent)
        return self._known[parent]

    def _folder_of(self, url: str, parent: str) -> Path:
        folder, local = self._folder, Path(url).parent
        if is_remote(url):
            assert self.cache is not None, "a remote source needs a cache"
            folder = folder or self.cache.dir / "index"
        elif folder is None:
            return local
        else:
            parent = str(local.resolve())  # not what the shard links to: two links may share its name
        digest = hashlib.sha256(os.fsencode(parent)).hexdigest()[:8]  # shards of two folders often share their names
        return folder / f"{parent.rpartition('/')[2]}-{digest}"

    def by_folder(self, urls: Sequence[str]) -> dict[Path, list[int]]:
        """Folder of indices → positions of its shards."""
        found: dict[Path, list[int]] = {}
        for number, url in enumerate(urls):
            found.setdefault(self.folder(url), []).append(number)
        return found

    def index(self, url: str) -> Path:
        return self.folder(url) / (os.path.splitext(_name(url))[0] + SUFFIX)


def _name(url: str) -> str:
    return without_query(url).rpartition("/")[2]


def _tabled(urls: Sequence[str], stats: Sequence[Stat], places: _Places) -> tuple[list[Rows], list[int]]:
    """Rows of the tables beside the indices that fit their shards, and the positions of these in `urls`."""
    found: list[Rows] = []
    positions: list[int] = []
    for folder, numbers in places.by_folder(urls).items():
        rows = Rows.read(folder) if len(numbers) >= _MIN_TABLE else None
        if rows is None or not len(rows):
            continue
        names = np.array([_name(urls[number]).encode("utf-8", "surrogateescape") for number in numbers])
        versions = np.array([stats[number].version.encode("utf-8", "surrogateescape") for number in numbers])
        sizes = np.array([stats[number].size for number in numbers])
        order = np.argsort(rows.columns["name"], kind="stable")
        at = order[np.minimum(np.searchsorted(rows.columns["name"], names, sorter=order), len(order) - 1)]
        fits = (rows.columns["name"][at] == names) & (rows.columns["version"][at] == versions)
        fits &= rows.columns["size"][at] == sizes
        found.append(rows.take(at[fits]))
        positions += np.array(numbers)[fits].tolist()
    return found, positions


def _keep_table(urls: Sequence[str], rows: Rows, places: _Places) -> None:
    """Write the rows beside the indices, in place of older ones of the same shards."""
    for folder, numbers in places.by_folder(urls).items():
        own, before = rows.take(np.array(numbers)), Rows.read(folder)
        if before is not None:
            others = ~np.isin(before.columns["name"], own.columns["name"])
            own = Rows.joined([own, before.take(np.flatnonzero(others))])
        with suppress(OSError):  # the indices have it all
            own.save(folder)


def _load(url: str, identity: str, places: _Places) -> ShardIndex:
    """The index of a shard of this identity, built if it is missing. UserError where the shard is another one."""
    try:
        index: ShardIndex | None = ShardIndex(url, places.index(url))
    except OSError as error:
        if not is_users(error):
            raise
        index = None
    except ValueError:
        index = None
    if index is None or index.identity != identity:
        index = _Work(url, _stat(url), places).build()
    if index is None or index.identity != identity:
        raise changed(url, "its index is of another shard")
    return index


def _say_what_is_built(source: str | Path, total: int, works: Sequence[_Work]) -> None:
    shown = redact(str(source))
    if num_outdated := sum(work.outdated for work in works):
        of_others = f"{num_outdated:,} of {total:,} indices beside the shards may be of others that stood there before"
        say(f"{shown}: {of_others}; they are built anew: store an index after its shard")
    doubtful = [work.stat.size for work in works if work.sha256]
    if sum(doubtful) >= _PARALLEL_BYTES:
        how = f"{len(doubtful):,} of {total:,} shards have another time than when they were indexed"
        say(f"{shown}: {how}; their content is compared, {sum(doubtful) / 1e9:.3g} GB")


class _Work:
    """One shard whose index is wanted."""

    def __init__(self, url: str, stat: Stat, places: _Places) -> None:
        self.url, self.stat, self.cache = url, stat, places.cache
        self.path, self.must_write = places.index(url), places.must_write
        self.outdated = False  # what lies beside the shard may be of another that stood there before
        self.sha256 = ""  # of the shard when it was indexed, if only its time or version is another now
        self.change = ""  # how the shard has changed since it was indexed

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
        return ShardIndex(url, _Places(folder, cache).index(url))
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
        index = self.indices[shard]
        if not index.has(row, "txt"):
            if reason := index.bad_captions.get(row):  # a link, or a file of another kind
                raise DecodeError(reason)
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


def unique_names(indices: Iterable[ShardIndex]) -> None:
    """UserError where two shards have the same file name."""
    seen: dict[str, str] = {}
    for index in indices:
        if index.name in seen:
            both = f"{redact(seen[index.name])} and {redact(index.url)}"
            raise UserError(f"{both} have the same file name; encode their folders separately")
        seen[index.name] = index.url
