"""Shards in an object store or on a web server: list them, stat them, and fetch them into a bounded local cache.

Everything goes through fsspec, so http, https, s3, gs and what else it knows are one code path. Credentials come from
the environment or fsspec's own configuration (~/.config/fsspec, FSSPEC_S3_…), never from ours. Whatever is said or
raised here has gone through `safety.redact`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.config import apply_config
from pydantic import Field
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from stack.config import Config, UserError, refusal
from stack.data.safety import check_source
from stack.files import is_at
from stack.log import say
from stack.shown import redact

ATTEMPTS = 6  # of one request
FIRST_WAIT = 2.0  # seconds; a wait is drawn between 0 and this, doubled after each attempt,
LONGEST_WAIT = 30.0  # … but at most this, so that all waits of a request are 60 s together, and 30 s in the mean
CHUNK = 8 * 2**20  # bytes of one range request, which are also what is held in memory
SILENCE = 60.0  # seconds without a byte after which a web server's connection is given up

_POLL = 0.2  # seconds between two looks whether other processes' downloads have left room
_TRANSIENT = frozenset({408, 425, 429, *range(500, 600)})  # HTTP statuses that may be another the next time
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PACKAGES = {
    "s3": "mmdit-stack[s3]",
    "gs": "mmdit-stack[gcs]",
    "gcs": "mmdit-stack[gcs]",
    "http": "fsspec[http]",
    "https": "fsspec[http]",
}
_ENTRY = re.compile(r"[0-9a-f]{32}-.+")  # names of a cache's files: nothing else in its folder is ever removed
_PARTIAL = re.compile(r"\.[0-9a-f]{32}-.+\.part")
_COMPRESSED = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4?|lzma|br|z|7z)|tgz|taz|tbz2?|txz|tlz|tzst|zip|7z|rar)$", re.IGNORECASE
)

T = TypeVar("T")


class CacheConfig(Config):
    """Where remote shards are kept on this node."""

    dir: Path | None = None
    """Folder on a local disk, shared by the node's processes; mmdit-cache-UID in the system's temporary folder if not
    given."""
    max_gb: float = Field(default=100, gt=0)
    """Size of all cached shards together, in 10⁹ bytes; the least recently used ones make room."""


class Stat(NamedTuple):
    """Bytes of a file, and a text that differs whenever its content does, as far as the store tells."""

    size: int
    version: str


def is_remote(source: str) -> bool:
    """Whether `source` is a URL of another scheme than file."""
    return re.match(r"(?!(file|local)://)[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def is_compressed(name: str) -> bool:
    """Whether a file's name, path or URL is that of a compressed archive."""
    return _COMPRESSED.search(name.partition("?")[0] if "://" in name else name) is not None


def list_shards(source: str) -> list[str]:
    """Sorted URLs of the shards that `source` means: the *.tar of a folder's URL, one .tar, or a glob; and of the
    compressed archives beside them.

    A folder or glob on a web server needs a page with links. Raises UserError where there is no shard or the package
    of the protocol is missing, PermissionError, and OSError where the store does not answer.
    """
    check_source(source)
    shown, on_web = redact(source), _on_web(source)
    path = source.partition("?")[0] if on_web else source
    magic = "*[" if on_web else "*[?"
    is_glob = any(sign in path for sign in magic)
    pattern = path if is_glob else f"{path.rstrip('/')}/*"

    def match() -> list[str]:
        fs, root = _filesystem(pattern)
        return [fs.unstrip_protocol(each["name"]) for each in _glob(fs, root, magic) if each["type"] != "directory"]

    try:
        if (path.endswith(".tar") or is_compressed(path)) and not is_glob:
            stat(source)
            return [source]
        urls = sorted(set(_retry(source, match)))
        if not is_glob:
            urls = [url for url in urls if url.endswith(".tar") or is_compressed(url)]
    except FileNotFoundError:
        raise UserError(f"{shown}: no such folder or shard") from None
    if not urls:
        hint = "; a web server must answer a folder with a page of links" if on_web else ""
        raise UserError(f"{shown}: no *.tar there{hint}")
    return urls


def stat(url: str) -> Stat:
    """Size and version of one file. Raises FileNotFoundError, PermissionError, OSError if the store does not answer."""
    info = _retry(url, lambda: _info(url))
    if info["type"] == "directory":
        raise FileNotFoundError(f"{redact(url)}: a folder, not a file")
    if info["size"] is None:
        raise UserError(f"{redact(url)}: the server does not tell the file's size (Content-Length)")
    return Stat(info["size"], _version(info))


def modified(url: str) -> float | None:
    """When a file was last written, in seconds by the store's own clock; None where the store does not tell.

    Raises what `stat` does.
    """

    def ask() -> float | None:
        fs, path = _filesystem(url)
        try:
            told = parsedate_to_datetime(fs.info(path)["Last-Modified"]) if _on_web(url) else fs.modified(path)
            return float(told.timestamp())
        except (KeyError, ValueError, OverflowError, NotImplementedError):
            return None

    return _retry(url, ask)


def read_bytes(url: str, max_bytes: int) -> bytes | None:
    """The content of a small file, or None if there is none.

    Raises UserError above `max_bytes`, PermissionError (an S3 bucket that must not be listed answers so for what it
    lacks, too), OSError if the store does not answer.
    """

    def read() -> bytes:
        fs, path = _filesystem(url)
        data = b""
        with fs.open(path, "rb", cache_type="none") as file:
            while len(data) <= max_bytes and (part := file.read(max_bytes + 1 - len(data))):
                data += part
        return data

    try:
        data = _retry(url, read)
    except FileNotFoundError:
        return None
    if len(data) > max_bytes:
        raise UserError(f"{redact(url)}: larger than the {max_bytes} bytes that a file of its kind may have")
    return data


# ---- fsspec


_instances: set[Any] = set()


def _filesystem(url: str) -> tuple[Any, str]:
    """(the file system of `url` in this process, its path there).

    fsspec keeps instances by process id, so a forked process gets its own. In that process it also drops those of the
    parent, whose finalizers would then close connections through an epoll that both processes share; `_instances`
    keeps them alive.
    """
    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        remedy = f"pip install '{_PACKAGES[protocol]}'" if protocol in _PACKAGES else error
        raise UserError(f"{protocol}:// needs a package that is not installed: {remedy}") from None
    except ValueError:
        raise UserError(f"{redact(url)}: unknown protocol {protocol!r}") from None
    configured = apply_config(kind, {})
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is 5 minutes for a whole file; proxies and ~/.netrc are only looked at when trusted.
        client = {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}
        options["client_kwargs"] = {**client, **configured.get("client_kwargs", {})}
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, **configured.get("config_kwargs", {})}
    fs, path = fsspec.url_to_fs(url, **options)
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # botocore and s3fs would try 25 times between two lines of ours
    _instances.add(fs)
    fs.invalidate_cache()  # S3 would answer from its last listing
    return fs, path


def _on_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _info(url: str) -> dict[str, Any]:
    fs, path = _filesystem(url)
    info: dict[str, Any] = fs.info(path)
    if url.startswith("file://"):
        info["mtime"] = os.stat(path).st_mtime_ns
    return info


def _version(info: dict[str, Any]) -> str:
    """What `info` tells of the content, best first: every file system has names of its own for it."""
    told = {re.sub(r"[^a-z0-9]", "", key.lower()): value for key, value in info.items()}
    names = ("etag", "md5hash", "contentmd5", "digest", "checksum", "generation", "blobid", "lastmodified", "mtime")
    for name in (*names, "modificationtime", "modify", "updated", "created"):
        if told.get(name):
            return f"{name} {told[name]}"
    return ""


def _glob(fs: Any, pattern: str, magic: str) -> list[dict[str, Any]]:
    """fsspec's own glob takes a server that does not answer for an empty folder."""
    folder, _, name = pattern.rpartition("/")
    folders = [folder]
    if any(sign in folder for sign in magic):
        folders = [each["name"].rstrip("/") for each in _glob(fs, folder, magic) if each["type"] == "directory"]
    found = []
    for folder in folders:
        for entry in fs.ls(folder + "/", detail=True):
            path = entry["name"].rstrip("/").replace("/./", "/")  # Caddy's pages link to ./name
            parent, _, base = path.rpartition("/")
            if parent == folder and fnmatchcase(base, name):
                found.append({**entry, "name": path})
    return found


# ---- trying again


class _ShortRead(Exception):
    """The store sent less than it said."""


class _NoRanges(Exception):
    """The web server sends whole files only."""


def _retry(url: str, call: Callable[[], T]) -> T:
    """`call()`, tried again where that may help; what it raises in the end names `url` and holds no secret.

    Raises FileNotFoundError, PermissionError or OSError; UserError and a full disk pass through.
    """
    shown = redact(url)

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        what = _describe(state.outcome.exception())
        again = f"attempt {state.attempt_number + 1} of {ATTEMPTS} in {state.next_action.sleep:.1f} s"
        say(f"{shown}: {what}; {again}")

    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
        retry=retry_if_exception(_is_transient),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return attempts(call)
    except (UserError, _NoRanges):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise
        raise _translate(shown, error) from None  # a traceback would show the URL as it was


def _translate(shown: str, error: Exception) -> Exception:
    status = _status(error)
    if _is_transient(error):
        return OSError(f"{shown}: {_describe(error)}; given up after {ATTEMPTS} attempts")
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(f"{shown}: no such file")
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        what = "access denied; credentials come from the environment or fsspec's configuration"
        return PermissionError(f"{shown}: {what} ({_describe(error)})")
    if status == 412:  # s3fs reads on condition that the file is the one it opened
        return UserError(f"{shown}: changed while it was read; index it again")
    return OSError(f"{shown}: {_describe(error)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was raised from: fsspec's FileNotFoundError may stand for any answer of a web server."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that `error` stands for, whichever library raised it; None for a broken connection."""
    for cause in _causes(error):
        if isinstance(cause, _connection_errors()):
            return None  # aiohttp raises these from parser errors that have a code of their own
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(cause, "status", None) or getattr(cause, "code", None)  # aiohttp, gcsfs
        if isinstance(status, int):
            return status
    return None


def _is_transient(error: BaseException | None) -> bool:
    if (status := _status(error)) is not None:
        return status in _TRANSIENT
    return any(isinstance(cause, _connection_errors()) for cause in _causes(error))


def _connection_errors() -> tuple[type[BaseException], ...]:
    """Of the libraries that are in use: importing them takes time."""
    kinds: tuple[type[BaseException], ...] = (_ShortRead, ConnectionError, TimeoutError, asyncio.TimeoutError)
    if aiohttp := sys.modules.get("aiohttp"):
        kinds += (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    if botocore := sys.modules.get("botocore.exceptions"):
        kinds += (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError)
    return kinds


def _describe(error: BaseException | None) -> str:
    """One line without secrets: the HTTP status, or what the first cause says."""
    if status := _status(error):
        return f"HTTP {status}"
    first = list(_causes(error))[-1]
    return redact(" ".join(str(first).split()).rstrip(".")) or type(first).__name__


# ---- downloads


def _download(url: str, size: int, descriptor: int) -> None:
    """Write the `size` bytes of `url` to an open file. A request that broke is repeated from the last whole chunk."""
    file: Any = None
    position = 0

    def next_chunk() -> bytes:
        nonlocal file
        try:
            if file is None:
                fs, path = _filesystem(url)
                file = fs.open(path, "rb", cache_type="none")
            file.seek(position)
            data: bytes = file.read(min(CHUNK, size - position))
            if not data:
                raise _ShortRead(f"ends at byte {position} of {size}")
            return data
        except BaseException as error:
            if file is not None:
                file.close()
            file = None
            if isinstance(error, ValueError) and position and url.startswith("http"):  # so fsspec says it cannot seek
                raise _NoRanges from None
            raise

    try:
        while position < size:
            position += _write(descriptor, _retry(url, next_chunk), position)
    except _NoRanges:
        _retry(url, lambda: _download_whole(url, size, descriptor))
    finally:
        if file is not None:
            file.close()


def _download_whole(url: str, size: int, descriptor: int) -> None:
    """The same in one request, for web servers without ranges."""
    fs, path = _filesystem(url)
    position = 0
    with fs.open(path, "rb", block_size=0) as file:
        while position < size:
            data = file.read(min(CHUNK, size - position))
            if not data:
                raise _ShortRead(f"ends at byte {position} of {size}")
            position += _write(descriptor, data, position)


def _write(descriptor: int, data: bytes, position: int) -> int:
    view = memoryview(data)
    while view:
        view = view[os.pwrite(descriptor, view, position + len(data) - len(view)) :]
    return len(data)


# ---- the cache


class ShardCache:
    """Whole shards on a local disk, shared by the processes of a node and never larger than `max_gb`.

    The folder holds DIGEST-NAME for each shard, DIGEST from its URL and version, its time of change being that of its
    last use; .DIGEST-NAME.part while one process, which holds a lock on it, downloads; and .lock, held while room is
    made. A .part has the size of its shard from the start, so downloads under way count; one without a lock is what a
    killed process left and is removed. A shard may be removed while others have it open: they read on, and its bytes
    are on the disk until they close it, which a `ShardReader` does when it opens its next one.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.dir = config.dir or Path(tempfile.gettempdir(), f"mmdit-cache-{os.getuid()}")
        self._must_be_ours = config.dir is None  # anyone can make a folder of this name
        self.max_bytes = int(config.max_gb * 1e9)

    def fetch(self, url: str, expected: Stat) -> Path:
        """The local file of a remote shard, downloaded if need be. `expected` is its `stat` from when it was indexed.

        Where processes share a cache that is too small for their downloads at one time, the file may be gone again
        before it is opened; `open` has no such gap. Raises what `open` does.
        """
        self.open(url, expected).close()
        return self._entry(url, expected)

    def open(self, url: str, expected: Stat) -> BinaryIO:
        """Open the local file of a remote shard for reading.

        Raises UserError if the shard is gone or changed since it was indexed, is larger than the cache, or cannot be
        kept in its folder; PermissionError; OSError if the store does not answer.
        """
        entry = self._entry(url, expected)
        if expected.size > self.max_bytes:
            sizes = f"{expected.size / 1e9:.6g} GB, the cache holds max_gb={self.max_bytes / 1e9:.6g}"
            raise UserError(f"{redact(url)}: the shard has {sizes}")
        try:
            self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._must_be_ours and self.dir.lstat().st_uid != os.getuid():
                raise UserError(f"{self.dir}: another user made this folder; name one as cache.dir")
            while True:
                with suppress(FileNotFoundError):
                    file = entry.open("rb")
                    os.utime(file.fileno())
                    return file
                with self._partial(entry) as descriptor:
                    # Who waited for the lock finds the shard there, or a lock on a file that is no longer in use.
                    if descriptor is not None and not entry.exists():
                        return self._fill(url, expected, entry, descriptor)
        except OSError as error:
            if error.errno is None:
                raise  # the store's, not this machine's
            message = f"{self.dir}: shards cannot be cached here ({error.strerror}); name another dir"
            raise refusal(error, message) from None

    def _entry(self, url: str, expected: Stat) -> Path:
        digest = hashlib.sha256(f"{url}\n{expected.version}".encode()).hexdigest()[:32]
        return self.dir / f"{digest}-{urlsplit(url).path.rpartition('/')[2][-50:]}"

    @contextmanager
    def _partial(self, entry: Path) -> Iterator[int | None]:
        """A descriptor of the temporary file of `entry`, under a lock; waits while another process has it.

        None if the file was renamed or removed meanwhile. Only who holds its lock renames or removes it.
        """
        path = entry.with_name(f".{entry.name}.part")
        with _locked(path) as descriptor:
            ours = is_at(path, descriptor)
            try:
                yield descriptor if ours else None
            finally:
                if ours and is_at(path, descriptor):
                    path.unlink()

    def _fill(self, url: str, expected: Stat, entry: Path, descriptor: int) -> BinaryIO:
        """Download into the temporary file and publish it as `entry`."""
        _check(url, expected)
        self._make_room(expected.size, descriptor)
        for last in (False, True):
            try:
                _download(url, expected.size, descriptor)
                os.fsync(descriptor)  # else a power cut can leave a published file of the right size with zeros in it
                break
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                if last:
                    needs = f"the disk is full, {redact(url)} needs {expected.size} bytes"
                    raise UserError(f"{self.dir}: {needs}; free some space, or name another dir") from None
                with _locked(self.dir / ".lock"):
                    _evict(self._scan()[0], expected.size)
        _check(url, expected)
        partial = entry.with_name(f".{entry.name}.part")
        file = partial.open("rb")  # before others can see and evict it
        partial.replace(entry)
        return file

    def _make_room(self, size: int, descriptor: int) -> None:
        """Evict until `size` more bytes fit, and reserve them by the length of the temporary file."""
        while True:
            with _locked(self.dir / ".lock"):
                entries, under_way = self._scan()
                if under_way + size <= self.max_bytes:
                    cached = sum(each.st_size for _, each in entries)
                    _evict(entries, cached + under_way + size - self.max_bytes)
                    os.truncate(descriptor, size)
                    return
            time.sleep(_POLL)  # others' downloads fill the rest; each ends, and its shard can then be evicted

    def _scan(self) -> tuple[list[tuple[Path, os.stat_result]], int]:
        """(shards, bytes of downloads under way); removes what killed downloads left."""
        entries, under_way = [], 0
        for found in os.scandir(self.dir):
            path = Path(found.path)
            with suppress(FileNotFoundError):
                if _ENTRY.fullmatch(found.name):
                    entries.append((path, found.stat()))
                elif _PARTIAL.fullmatch(found.name):
                    try:
                        with _locked(path, fcntl.LOCK_NB) as descriptor:
                            if is_at(path, descriptor):
                                path.unlink()
                    except BlockingIOError:
                        under_way += found.stat().st_size
        return entries, under_way


def _evict(entries: list[tuple[Path, os.stat_result]], size: int) -> None:
    """Remove the least recently used until at least `size` bytes of them are gone, or all."""
    for path, each in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
        if size <= 0:
            return
        path.unlink(missing_ok=True)
        size -= each.st_size


def _check(url: str, expected: Stat) -> None:
    try:
        now = stat(url)
    except FileNotFoundError:
        raise UserError(f"{redact(url)}: gone since it was indexed") from None
    if now != expected:
        was, is_now = (f"{each.size} bytes {each.version}".rstrip() for each in (expected, now))
        raise UserError(f"{redact(url)}: changed since it was indexed ({was}; now {is_now}); index it again")


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of `path`, made if missing, under an exclusive lock that ends with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do: a process forked meanwhile has it open too
    finally:
        os.close(descriptor)
