"""Who does what (pre-encodes a shard, evaluates a snapshot): claim files in a shared folder, on which a heartbeat says
that their owner lives.

A claim is a hint, not a lock: outputs are pure functions of their sources and appear by rename, so two workers that do
the same work after a broken takeover write the same twice. Whoever takes over a stale claim loses no more than what
the dead worker had in hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from stack.files import TEMPORARY, create, place, temporary_name

HEARTBEAT_S = 10.0
STALE_S = 60.0


class Claims:
    """The claims of one worker in `folder`.

    A claim is stale when its owner's process is gone (of this host and container), or when nothing was heard of it for
    STALE_S by the folder's own clock, so that clocks of several hosts need not agree.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        process = psutil.Process()
        self._owner = {
            "host": socket.gethostname(),
            "place": place(),
            "pid": process.pid,
            "started": process.create_time(),
        }

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """True if this worker holds `name` until the end of the block, False if another one does."""
        path = self._folder / name
        mark = json.dumps({**self._owner, "mark": uuid.uuid4().hex})
        if not (self._create(path, mark) or (self._remove_stale(path) and self._create(path, mark))):
            yield False
            return
        done = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, done), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            done.set()
            heart.join()
            if _read(path) == mark:
                path.unlink(missing_ok=True)

    def held(self) -> set[str]:
        """The names that living workers hold, this one's among them."""
        marks = {path: _read(path) for path in self._folder.glob("[!.]*")}
        return {path.name for path, mark in marks.items() if mark is not None and not self._stale(path, mark)}

    def sweep(self, folder: Path, names: Collection[str]) -> None:
        """Remove what dead writers of these files of `folder` left: temporary files (`temporary_name`) of processes
        that are gone, or long untouched."""
        for leftover in folder.glob(".*.tmp"):
            match = TEMPORARY.fullmatch(leftover.name)
            if match is None or match["name"] not in names:
                continue
            with contextlib.suppress(FileNotFoundError):
                dead = match["place"] == self._owner["place"] and not is_alive(int(match["pid"]))
                if dead or self._now() - leftover.stat().st_mtime > 10 * STALE_S:
                    leftover.unlink()

    def _create(self, path: Path, mark: str) -> bool:
        """By a hard link, which is atomic on network file systems too, and never shows half a file."""
        draft = temporary_name(path)
        with create(draft) as file:
            file.write(mark.encode())
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _remove_stale(self, path: Path) -> bool:
        known = _read(path)
        if known is None:
            return True  # just released
        if not self._stale(path, known):
            return False
        aside = temporary_name(path)
        try:
            os.rename(path, aside)  # of several workers one gets it
        except FileNotFoundError:
            return True
        taken = _read(aside)
        if taken != known:  # another worker had removed the stale one and claimed anew in the meantime: give it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return taken == known

    def _stale(self, path: Path, mark: str) -> bool:
        try:
            owner = json.loads(mark)
            here = owner["place"] == self._owner["place"]
            if here and not is_alive(owner["pid"], owner["started"]):
                return True
        except (ValueError, KeyError, TypeError):
            pass  # not ours, or from another version: its age tells
        try:
            return self._now() - path.stat().st_mtime > STALE_S
        except FileNotFoundError:
            return True

    def _now(self) -> float:
        probe = temporary_name(self._folder / "clock")
        create(probe).close()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether there is a process `pid` here, and it is the one that started then."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and started in (None, process.create_time())
    except psutil.NoSuchProcess:
        return False


def owners(folder: Path) -> list[str]:
    """Who holds claims in `folder`, as "name (host, process)"."""
    found = []
    for path in sorted(folder.glob("[!.]*")):
        with contextlib.suppress(ValueError, KeyError, OSError):
            owner = json.loads(path.read_text(encoding="utf-8"))
            found.append(f"{path.name} ({owner['host']}, process {owner['pid']})")
    return found
