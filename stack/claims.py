"""Who does what (pre-encodes a shard, evaluates a snapshot): claim files in a shared folder, on which a heartbeat says
that their owner lives.

A claim is a hint, not a lock: outputs are pure functions of their sources and appear by rename, so two workers that do
the same work after a broken takeover write the same twice. A worker that was suspended asks `Claims.owns` before it
publishes. Whoever takes over a dead claim loses no more than what the dead worker had in hand.

No clock is compared with another one, for clocks are set, and a file server has its own. A claim is dead if its owner's
process is gone (on this host and in this container), or if no heartbeat came while this process watched it. A claim
that is old by the folder's clock is watched at once, and for a shorter time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from stack.config import UserError
from stack.files import TEMPORARY, create, place, temporary_name

HEARTBEAT_S = 5.0
STALE_S = 60.0
_PATIENCE = 2.5  # heartbeats for which a claim is watched that is old by the folder's clock
_MAX_BYTES = 2**16  # of a claim that are read


class Owner(NamedTuple):
    """What a claim contains. place: see `stack.files.place`.  note: what `hold` was given."""

    host: str
    place: str
    pid: int
    started: float | None
    ticks: int | None
    note: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


class _Look(NamedTuple):
    """A claim file as it was read. content: empty if it cannot be read.  beat: another one after each heartbeat."""

    content: str
    beat: tuple[int, int]
    mtime: float


class _Watch(NamedTuple):
    """beat: the last heartbeat that was seen.  quiet: seconds watched since.  looked: time of the last look."""

    beat: tuple[int, int]
    quiet: float
    looked: float


_watched: dict[Path, _Watch] = {}


class Claims:
    """The claims of one worker in `folder`."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: not a folder; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        process = psutil.Process()
        self._owner = {
            "host": socket.gethostname(),
            "place": place(),
            "pid": process.pid,
            "started": process.create_time(),
            "ticks": _ticks(process.pid),
        }
        self._mine: dict[str, tuple[str, float]] = {}  # name → the claim's content, and when it was certainly there
        self._hearts = _Hearts()

    @contextmanager
    def hold(self, name: str, note: Mapping[str, Any] | None = None) -> Iterator[bool]:
        """True if this worker holds `name` until the end of the block, False if another one does.

        `note` is stored in the claim for others to read. Blocks for a few heartbeats where the claim of another worker
        looks old. Names with a dot in front are not among `held`.
        """
        path = self._folder / name
        content = json.dumps({**self._owner, "note": dict(note or {}), "mark": uuid.uuid4().hex})
        descriptor = self._create(path, content)
        if descriptor is None and self._remove(path):
            descriptor = self._create(path, content)
        if descriptor is None:
            yield False
            return
        self._mine[name] = (content, time.monotonic())
        try:
            with self._hearts.of(descriptor):
                yield True
        finally:
            os.close(descriptor)
            del self._mine[name]
            if _content(path) == content:
                path.unlink(missing_ok=True)

    def owns(self, name: str) -> bool:
        """Whether `name`, which this worker holds, was not taken over, as after a suspension.

        The file is read only if the last look is so long ago that the claim may have been taken.
        """
        content, certain = self._mine[name]
        now = time.monotonic()
        if now - certain > 2 * HEARTBEAT_S:
            if _content(self._folder / name) != content:
                return False
            self._mine[name] = (content, now)
        return True

    def names(self) -> set[str]:
        """The names that are claimed, by living or dead workers: one listing."""
        return {name for name in os.listdir(self._folder) if not name.startswith(".")}

    def held(self) -> set[str]:
        """The names that living workers hold, this one's among them. Blocks as `hold` does."""
        return {name for name in self.owners() if not name.startswith(".")}

    def owners(self, prefix: str = "") -> dict[str, Owner | None]:
        """Name → owner of the claims of living workers; None for one that cannot be read. Blocks as `hold` does."""
        looks = self._looks(prefix)
        dead = self._dead(looks)
        return {path.name: _owner(look.content) for path, look in looks.items() if path not in dead}

    def bury(self) -> None:
        """Remove the claims of dead workers."""
        looks = self._looks("")
        for path in self._dead(looks):
            self._replace(path, looks[path])

    def sweep(self, folder: Path, names: Collection[str], listed: Iterable[str] | None = None) -> None:
        """Remove what dead writers of these files of `folder` left: temporary files (`temporary_name`) of processes
        that are gone, or long untouched by the folder's clock.

        To be called for files that no living worker holds: a writer that was suspended for long finds its file gone.
        `listed`: the names in `folder`, if they are there already.
        """
        for leftover in os.listdir(folder) if listed is None else listed:
            match = TEMPORARY.fullmatch(leftover)
            if match is None or match["name"] not in names:
                continue
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                dead = match["place"] == self._owner["place"] and not is_alive(int(match["pid"]))
                if dead or self._now() - (folder / leftover).lstat().st_mtime > 10 * STALE_S:
                    (folder / leftover).unlink()

    def _create(self, path: Path, content: str) -> int | None:
        """A descriptor of the new file, None if there is one. O_EXCL is atomic on network file systems too. Others may
        read it before it is filled: it then counts as a claim of an unknown owner."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return None
        try:
            os.write(descriptor, content.encode())
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return descriptor

    def _remove(self, path: Path) -> bool:
        """Whether there is no claim at `path` any more: it was released, or dead."""
        look = _look(path)
        return look is None or (path in self._dead({path: look}) and self._replace(path, look))

    def _replace(self, path: Path, dead: _Look) -> bool:
        """Remove a dead claim, under a guard claim, so that only one worker does. False if this worker did not."""
        guard = path.with_name(f".{path.name}.takeover")
        descriptor = self._create(guard, json.dumps(self._owner))
        if descriptor is None:
            look = _look(guard)
            if look is not None and guard in self._dead({guard: look}):  # killed within these lines
                guard.unlink(missing_ok=True)
            return False
        try:
            now = _look(path)
            if now is not None and (now.content, now.beat) != (dead.content, dead.beat):
                return False  # another worker was faster, or the owner woke up
            aside = temporary_name(path)
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, aside)  # works for a folder, too
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                aside.unlink()
            return True
        finally:
            os.close(descriptor)
            guard.unlink(missing_ok=True)

    def _looks(self, prefix: str) -> dict[Path, _Look]:
        paths = {self._folder / name: None for name in sorted(os.listdir(self._folder))}
        for gone in [path for path in _watched if path.parent == self._folder and path not in paths]:
            del _watched[gone]
        claims = [path for path in paths if path.name.startswith(prefix) and path.suffix != ".tmp"]
        return {path: look for path in claims if (look := _look(path)) is not None}

    def _dead(self, looks: Mapping[Path, _Look]) -> set[Path]:
        """The claims, just looked at, whose owners are dead. Blocks until it is certain of those that look old."""
        dead: set[Path] = set()
        old: dict[Path, _Look] = {}
        now: float | None = None
        for path, look in looks.items():
            owner = _owner(look.content)
            here = owner if owner is not None and owner.place == self._owner["place"] else None
            gone = here is not None and not is_alive(here.pid, here.started, here.ticks)
            if gone or _quiet(path, look) > STALE_S:
                dead.add(path)
            elif here is None:
                now = self._now() if now is None else now
                if now - look.mtime > STALE_S:
                    old[path] = look
        while old:
            for path, look in list(old.items()):
                again = _look(path)
                if again is None or again.beat != look.beat:
                    del old[path]
                elif _quiet(path, again) > _PATIENCE * HEARTBEAT_S:
                    dead.add(path)
                    del old[path]
            if old:
                time.sleep(HEARTBEAT_S / 5)
        return dead

    def _now(self) -> float:
        probe = temporary_name(self._folder / "clock")
        create(probe).close()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


class _Hearts:
    """One thread that beats for all claims of a worker, while it has any. They are files of their own, whatever is at
    their paths by now."""

    def __init__(self) -> None:
        self.descriptors: set[int] = set()
        self.lock = threading.Lock()
        self._done = threading.Event()

    @contextmanager
    def of(self, descriptor: int) -> Iterator[None]:
        with self.lock:
            if not self.descriptors:
                self._done = threading.Event()
                threading.Thread(target=_beat, args=(self, self._done), daemon=True).start()
            self.descriptors.add(descriptor)
        try:
            yield
        finally:
            with self.lock:  # from here on, the number may be another file's
                self.descriptors.remove(descriptor)
                if not self.descriptors:
                    self._done.set()


def _beat(hearts: _Hearts, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with hearts.lock:
            for descriptor in () if done.is_set() else hearts.descriptors:
                with contextlib.suppress(OSError):
                    os.utime(descriptor)


def _quiet(path: Path, look: _Look) -> float:
    """Seconds for which this process has watched the claim without a heartbeat.

    Between two looks, no more than one heartbeat counts: this process may have been suspended, or the server away.
    """
    now, known = time.monotonic(), _watched.get(path)
    quiet = 0.0
    if known is not None and known.beat == look.beat:
        quiet = known.quiet + min(now - known.looked, HEARTBEAT_S)
    _watched[path] = _Watch(look.beat, quiet, now)
    return quiet


def _look(path: Path) -> _Look | None:
    """None if there is no file. It is opened, for what a network file system tells of a closed one may be old."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None  # removed by another host at this moment
        if error.errno not in (errno.EACCES, errno.ELOOP, errno.ENXIO):
            raise
        try:
            found, content = path.lstat(), b""
        except FileNotFoundError:
            return None
    else:
        try:
            found = os.fstat(descriptor)
            content = os.read(descriptor, _MAX_BYTES) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(descriptor)
    return _Look(content.decode("utf-8", "replace"), (found.st_ino, found.st_mtime_ns), found.st_mtime)


def _content(path: Path) -> str | None:
    look = _look(path)
    return None if look is None else look.content


def _owner(content: str) -> Owner | None:
    """None for a claim that is damaged, not yet filled or of something else: its heartbeat alone counts."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    host, where, pid, note = (values.get(name) for name in ("host", "place", "pid", "note"))
    started, ticks = values.get("started"), values.get("ticks")
    if not isinstance(where, str) or type(pid) is not int or not 0 < pid < 2**31:
        return None
    return Owner(
        host=host if isinstance(host, str) else "unknown host",
        place=where,
        pid=pid,
        started=started if isinstance(started, int | float) else None,
        ticks=ticks if isinstance(ticks, int) else None,
        note=note if isinstance(note, dict) else {},
    )


def note_of(path: Path) -> dict[str, Any]:
    """The note of a claim, whether its owner lives or not; empty if there is none."""
    owner = _owner(_content(path) or "")
    return {} if owner is None else owner.note


def is_alive(pid: int, started: float | None = None, ticks: int | None = None) -> bool:
    """Whether there is a process `pid` here, and it is the one that started then.

    `ticks` (since the host started) decides if given: `started` depends on how the host's clock was set meanwhile.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        own = _ticks(pid)
        if ticks is not None and own is not None:
            return own == ticks
        return started in (None, process.create_time())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # another user's


def _ticks(pid: int) -> int | None:
    """Clock ticks from the host's start to the process's, where /proc has them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
