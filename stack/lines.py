"""Files of one JSON object per line that a run appends to: metrics.jsonl and keys.jsonl.

Lines are in order of their steps. A damaged line is skipped, wherever it is in the file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stack.config import UserError, is_users
from stack.files import publish

BLOCK = 2**20
"""Bytes that are read at once from the end of a file."""
MAX_LINE = 2**26
"""Bytes of the longest line; what is longer is damaged."""
MAX_PENDING = 2**26
"""Bytes of lines that are kept in memory until the file system has stored them."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, one at a time; none if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            values = _parsed(line)
            if values is not None:
                yield values


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if the line is damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def backwards(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a file from the last to the first, each with the offset of its end; none if there is no file.

    At most one block and one line are in memory.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for end, line in _split_backwards(file):
            values = _parsed(line)
            if values is not None:
                yield end, values


def _split_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    position = end = file.seek(0, os.SEEK_END)
    rest = b""
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        block = file.read(position - start)
        stop = len(block)
        while (newline := block.rfind(b"\n", 0, stop)) >= 0:
            yield end, block[newline + 1 : stop] + rest
            rest, stop, end = b"", newline, start + newline + 1
        if len(rest) <= MAX_LINE:
            rest = block[:stop] + rest
        position = start
    yield end, rest


def last_line(path: Path, step: int) -> tuple[int, dict[str, Any]]:
    """The offset of the end of the last line of a step up to `step`, and the line. 0 and {} if there is none."""
    before = (found for found in backwards(path) if found[1]["step"] <= step)
    return next(before, (0, {})) if step > 0 else (0, {})  # steps count from 1


class LineFile:
    """Appends to `path`, after the lines of steps up to `step`; the lines after those are cut off.

    A line that cannot be written ends nothing: it is kept in memory and written with a later one. Lines stay in memory
    until `sync` has brought them to the disk, at most MAX_PENDING bytes of them.
    Raises UserError where something else than a file is at `path`.
    """

    def __init__(self, path: Path, step: int, say: Callable[[str], None]):
        self.path = path
        self._say = say
        self._descriptor: int | None = None
        self._pending = bytearray()
        self._written = 0  # bytes of `_pending` that the file has
        self._failed = False
        self._dropping = False
        try:
            _make_own(path)
            self._stored, self.last = last_line(path, step)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, self._stored)
            if self._stored and os.pread(self._descriptor, 1, self._stored - 1) != b"\n":
                self._pending += b"\n"
        except OSError as error:
            if is_users(error):
                raise UserError(f"{path}: {error.strerror}: move it away, or give run.dir a new folder") from None
            raise

    def append(self, values: dict[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        if len(self._pending) + len(line) > MAX_PENDING and not self.sync():
            if not self._dropping:
                self._say(f"{self.path}: {MAX_PENDING / 1e6:.0f} MB of lines could not be written: later ones are lost")
            self._dropping = True
            return
        self._pending += line
        self.last = values
        self._write()

    def sync(self) -> bool:
        """Bring all lines to the disk. False if some could not be written: they are kept."""
        if not self._write():
            return False
        assert self._descriptor is not None
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error)
            return False
        self._stored += len(self._pending)
        self._pending.clear()
        self._written = 0
        self._dropping = False
        return True

    def _write(self) -> bool:
        """Write the lines that the file does not have yet, each at its place, so that no half line stays in between."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            while self._written < len(self._pending):
                with memoryview(self._pending) as pending, pending[self._written :] as left:
                    self._written += os.pwrite(self._descriptor, left, self._stored + self._written)
        except OSError as error:
            self._fail(error)
            return False
        if self._failed:
            self._say(f"{self.path}: all lines are written again")
            self._failed = False
        return True

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._say(f"{self.path} cannot be written ({error}): its lines are kept and written later")
        self._failed = True
        if error.errno not in _FULL:
            self._written = 0  # the file system may have lost what it had not stored
            self._close()  # a file handle that is stale stays so

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        self.sync()
        self._close()


def _make_own(path: Path) -> None:
    """Put a copy in the place of a link, which may lead to a file of others, or be one of two names of a file."""
    if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
        with publish(path) as temporary:
            if path.is_file():
                shutil.copyfile(path, temporary)
