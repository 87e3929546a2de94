"""Results of evaluations.

eval/STEP/MARK.json   one result, published by rename: the truth, whoever measured it. MARK is a fingerprint of the
                      settings and of the training that wrote the snapshot
eval/STEP/MARK-*.png  the samples that were looked at
eval.jsonl            one line per result: a view of these files
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stack import config as configuration
from stack.claims import Claims
from stack.config import UserError, is_users
from stack.files import publish
from stack.log import say


def mark_of(settings: dict[str, Any], origin: str | None) -> str:
    """origin: of the training that wrote the snapshot; None if an older version did."""
    return configuration.fingerprint_of(settings | ({"origin": origin} if origin else {}))[:12]


class Results:
    """The results in the folder `run`. Any number of evaluators add to them.

    An evaluator appends its lines to eval.jsonl. It reads what the others have appended in the meantime, and writes the
    whole file anew only where a line is replaced or the file is damaged or missing. All this happens under the claim
    "eval.jsonl" of `leases`.
    """

    def __init__(self, run: Path, leases: Claims):
        self.run = run
        self.path = run / "eval.jsonl"
        self._leases = leases
        self._inode = self._end = 0
        self._lines: dict[str, int] = {}  # which result → hash of its line

    def place(self, step: int, mark: str) -> Path:
        return self.run / "eval" / f"{step:08d}" / f"{mark}.json"

    def check_place(self, step: int, mark: str) -> None:
        """UserError where a result could not be published, which is better known before it is measured."""
        path = self.place(step, mark)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path.parent}: a file is in the place of a folder of results; remove it") from None
        if path.is_dir():
            raise UserError(f"{path}: a folder is in the place of a result; remove it")

    def publish(self, result: dict[str, Any], mark: str) -> None:
        """A result of the same settings is replaced."""
        with publish(self.place(result["step"], mark)) as temporary:
            temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")

    def append(self, result: dict[str, Any]) -> None:
        """Add the line of a result that was published to eval.jsonl."""
        line, key = json.dumps(result) + "\n", _key(result)
        with self._claimed():
            if not self._catch_up() or self._lines.get(key, hash(line)) != hash(line):
                self._write()
            elif key not in self._lines:
                with self.path.open("ab", buffering=0) as file:
                    file.write(line.encode())
                self._note(line.encode())

    def gather(self) -> None:
        """Write eval.jsonl from all results, sorted by step. UserError where something else is in its place."""
        try:
            with self._claimed():
                self._write()
        except OSError as error:
            if not is_users(error):
                raise
            raise UserError(f"{self.path}: cannot be written, remove what is there: {error}") from None

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        while True:
            with self._leases.hold(self.path.name) as mine:
                if mine:
                    yield
                    return
            time.sleep(0.1)

    def _catch_up(self) -> bool:
        """Read what was appended since the last time. Whether the file has whole lines of results only."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if not stat.st_size or (stat.st_ino == self._inode and stat.st_size < self._end):
                    return False  # emptied or cut
                if stat.st_ino != self._inode:
                    self._inode, self._end, self._lines = stat.st_ino, 0, {}
                file.seek(self._end)
                appended = file.readlines()
            for line in appended:
                self._note(line)
        except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
            return False
        return not appended or appended[-1].endswith(b"\n")

    def _note(self, line: bytes) -> None:
        self._lines[_key(json.loads(line))] = hash(line.decode())
        self._end += len(line)

    def _write(self) -> None:
        lines = []
        for folder in sorted((self.run / "eval").glob("*"), key=lambda folder: folder.name.zfill(20)):
            for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
                result = read(path)
                if result is None:
                    say(f"{path}: damaged, left out of {self.path}; evaluate this step again, or remove the file")
                else:
                    lines.append(json.dumps(result) + "\n")
        if self.path.is_file() == bool(lines) and (not lines or self.path.read_bytes() == "".join(lines).encode()):
            return  # a file that changes is a sign of progress
        with publish(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """The result in the file `path`; None if there is none, or the file is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _key(result)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(result)


def _key(result: dict[str, Any]) -> str:
    """What no two lines have in common. Raises KeyError or TypeError where `result` is none."""
    return configuration.fingerprint_of([int(result["step"]), result["settings"], result.get("origin")])
