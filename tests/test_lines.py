"""Files of lines that grow: what a resume keeps, and what a file system that fails for a moment costs."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stack import lines
from stack.config import UserError
from stack.lines import LineFile, read_lines

DAMAGED = {
    "empty": b"",
    "spaces": b"   ",
    "garbage": b"\x00\xff\xfe{]",
    "zeros": bytes(5000),
    "cut off": b'{"step": 4, "lo',
    "a number": b"4",
    "a list": b'[{"step": 4}]',
    "null": b"null",
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "4"}',
    "a step that is true": b'{"step": true}',
    "not UTF-8": '{"step": 4, "note": "ä"}'.encode("latin-1"),
    "deep": b"[" * 100_000,
}


def line(step: int, **values: object) -> bytes:
    return json.dumps({"step": step, **values}).encode() + b"\n"


def steps(path: Path) -> list[int]:
    return [values["step"] for values in read_lines(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("block", [7, 2**20])
def test_a_resume_keeps_the_lines_up_to_its_step_whatever_is_damaged(path, said, monkeypatch, damage, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    before = line(1) + damage + b"\n" + line(2) + line(3)
    path.write_bytes(before + damage + b"\n" + line(4) + line(5) + damage)
    inode = path.stat().st_ino
    file = LineFile(path, 3, said.append)
    assert file.last == {"step": 3}
    assert path.read_bytes() == before
    file.append({"step": 4, "loss": 2.0})
    file.close()
    assert path.read_bytes() == before + line(4, loss=2.0)
    assert steps(path) == [1, 2, 3, 4]
    assert path.stat().st_ino == inode  # the file is cut, not written anew
    assert not said


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_last_line_without_its_end_is_kept_if_it_is_whole(path, said, step, kept):
    path.write_bytes((line(1) + line(2) + line(3))[:-1])
    file = LineFile(path, step, said.append)
    file.append({"step": 10})
    file.close()
    assert steps(path) == [*kept, 10]
    assert path.read_bytes().count(b"\n") == len(kept) + 1


def test_a_file_of_the_folder_beside_is_not_cut_through_a_link(path, said, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(line(1) + line(2))
    for link in (path.symlink_to, path.hardlink_to):
        link(other)
        LineFile(path, 1, said.append).close()
        assert (path.read_bytes(), other.read_bytes()) == (line(1), line(1) + line(2))
        assert not path.is_symlink()
        path.unlink()


def test_something_else_in_its_place_is_one_line(path, said):
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*move it away"):
        LineFile(path, 3, said.append)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size`, as on a full disk. A write that begins below it is cut short."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_have_no_room_are_written_when_there_is_some(path, said):
    file = LineFile(path, 0, said.append)
    file.append({"step": 1})
    assert file.sync()
    with at_most(len(line(1)) + 5):
        for step in (2, 3, 4):
            file.append({"step": step})
        assert not file.sync()
        assert path.read_bytes() == line(1) + line(2)[:5]
    file.append({"step": 5})
    assert path.read_bytes() == b"".join(map(line, range(1, 6)))
    assert file.sync()
    file.close()
    assert ["its lines are kept" in said[0], "written again" in said[1], len(said)] == [True, True, 2]


def test_after_a_kill_on_a_full_disk_the_half_line_goes(path, said):
    file = LineFile(path, 0, said.append)
    with at_most(len(line(1)) + 5):
        file.append({"step": 1})
        file.append({"step": 2})
        file.append({"step": 3})
    LineFile(path, 2, said.append).close()
    assert path.read_bytes() == line(1)


def test_a_handle_that_went_stale_is_opened_anew_and_nothing_is_lost(path, said):
    file = LineFile(path, 0, said.append)
    file.append({"step": 1})
    assert file.sync()
    file.append({"step": 2})
    os.close(file._descriptor)
    file.append({"step": 3})
    path.write_bytes(line(1))  # what was not on the disk is lost with the handle
    file.append({"step": 4})
    file.close()
    assert steps(path) == [1, 2, 3, 4]


def test_memory_for_lines_has_a_bound(path, said, monkeypatch):
    monkeypatch.setattr(lines, "MAX_PENDING", 10 * len(line(10)))
    file = LineFile(path, 0, said.append)
    for step in range(10, 40):
        file.append({"step": step})
    assert len(file._pending) <= lines.MAX_PENDING
    with at_most(path.stat().st_size):
        for step in range(40, 90):
            file.append({"step": step})
        assert len(file._pending) <= lines.MAX_PENDING
    file.append({"step": 90})
    file.close()
    found = steps(path)
    assert found[:30] == list(range(10, 40))
    assert found == sorted(set(found))
    assert found[-1] == 90
    assert any("later ones are lost" in message for message in said)
