"""Claims on a shared folder: whose owner lives keeps them, others are taken; what dead writers left is swept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stack import claims
from stack.claims import Claims
from stack.files import place, temporary_name

NOBODY = 2**22 + 1  # beyond the kernel's largest process id


def write(path: Path, **owner: object) -> Path:
    """The claim of a process of another host, unless `owner` says where."""
    path.write_text(
        json.dumps({"host": "elsewhere", "place": "0" * 8, "pid": 1, "started": 0.0, **owner}), encoding="utf-8"
    )
    return path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def taken(folder: Path, name: str = "00000") -> bool:
    with Claims(folder).hold(name) as mine:
        return mine


def test_a_claim_of_another_host_is_taken_when_it_is_old(tmp_path):
    path = write(tmp_path / "00000")
    assert not taken(tmp_path)
    assert Claims(tmp_path).held() == {"00000"}
    age(path, claims.STALE_S - 5)
    assert not taken(tmp_path)
    age(path, claims.STALE_S + 1)
    assert Claims(tmp_path).held() == set()
    assert taken(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("where", ["here", "another container"])
def test_a_process_id_says_something_in_its_own_container_alone(tmp_path, where):
    gone = {"host": socket.gethostname(), "pid": NOBODY}
    write(tmp_path / "00000", **gone, place=place() if where == "here" else "0" * 8)
    assert taken(tmp_path) == (where == "here")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's namespaces")
def test_the_place_is_the_process_ids_namespace():
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable]
    code = "from stack.files import place; print(place())"
    there = subprocess.run([*command, "-c", code], capture_output=True, text=True)
    if there.returncode:
        pytest.skip("namespaces cannot be made here")
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.stdout.strip() == place() != there.stdout.strip()


def test_a_claim_of_a_later_process_with_the_same_id_is_taken(tmp_path):
    mine = psutil.Process()
    write(tmp_path / "00000", place=place(), pid=mine.pid, started=mine.create_time())
    assert not taken(tmp_path)
    write(tmp_path / "00000", place=place(), pid=mine.pid, started=mine.create_time() - 1)
    assert taken(tmp_path)


def test_a_heartbeat_keeps_a_claim_and_its_end_gives_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claims, "STALE_S", 4.0)  # a busy machine may stand still for a second or two
    other = Claims(tmp_path)
    other._owner = {"host": "elsewhere", "place": "0" * 8, "pid": 1, "started": 0.0}
    with other.hold("00000") as held:
        assert held
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            assert not taken(tmp_path)
            time.sleep(0.05)
    monkeypatch.setattr(claims, "_beat", lambda path, done: None)  # as if its host had lost power
    with other.hold("00000") as held:
        assert held
        assert not taken(tmp_path)
        time.sleep(4.2)
        with Claims(tmp_path).hold("00000") as mine:
            assert mine
            mark = (tmp_path / "00000").read_text()
            assert not taken(tmp_path)
            with other.hold("00000") as again:
                assert not again
    assert json.loads(mark)["pid"] == os.getpid()
    assert not (tmp_path / "00000").exists()


def test_who_comes_back_leaves_the_claim_of_who_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_beat", lambda path, done: None)
    other = Claims(tmp_path)
    other._owner = {"host": "elsewhere", "place": "0" * 8, "pid": 1, "started": 0.0}
    holding = other.hold("00000")
    assert holding.__enter__()
    age(tmp_path / "00000", claims.STALE_S + 1)
    with Claims(tmp_path).hold("00000") as mine:
        assert mine
        holding.__exit__(None, None, None)
        assert (tmp_path / "00000").exists()


def leave(path: Path, where: str, pid: int, seconds: float = 0) -> Path:
    """A temporary file of `path` by a process of `where`, untouched for some time."""
    name = temporary_name(path).name.replace(f".{place()}.{os.getpid()}.", f".{where}.{pid}.")
    left = path.with_name(name)
    left.touch()
    age(left, seconds)
    return left


def test_what_dead_writers_left_is_swept(tmp_path, monkeypatch):
    target, here, there, long = tmp_path / "1.tar", place(), "0" * 8, 10 * claims.STALE_S
    gone = [
        leave(target, here, NOBODY),
        leave(target, there, 1, long + 5),
        leave(target, here, os.getpid(), long + 5),
        leave(tmp_path / "1_stats.json", here, NOBODY),
    ]
    stays = [
        leave(target, here, os.getpid()),
        leave(target, there, NOBODY, long - 5),
        leave(tmp_path / "10.tar", there, 123, long + 5),  # another shard's, whose writer may be slow
        leave(tmp_path / "10.tar", here, NOBODY),
        leave(tmp_path / "1.tar.tar", here, NOBODY),
        tmp_path / ".1.tar.by-hand.tmp",
    ]
    stays[-1].touch()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the folder's clock alone counts
    Claims(tmp_path / ".claims").sweep(tmp_path, ["1.tar", "1_stats.json"])
    assert sorted(tmp_path.glob(".*.tmp")) == sorted(stays)
    assert not any(path.exists() for path in gone)


def elsewhere(folder: Path) -> Claims:
    """The claims of a worker of another host."""
    worker = Claims(folder)
    worker._owner = {"host": "elsewhere", "place": "0" * 8, "pid": 1, "started": 0.0}
    return worker


@pytest.mark.parametrize("step", [86400.0, -86400.0])
def test_a_clock_that_is_set_leaves_living_claims(tmp_path, monkeypatch, step):
    """The start of a process by the clock changes with it: /proc/stat's btime is the clock less the time since boot."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.2)
    real, folder_now = psutil.Process.create_time, Claims._now
    with Claims(tmp_path).hold("here") as here, elsewhere(tmp_path).hold("there") as there:
        assert here
        assert there
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + step)
        monkeypatch.setattr(Claims, "_now", lambda self: folder_now(self) + step)
        assert Claims(tmp_path).held() == {"here", "there"}
        assert not taken(tmp_path, "here")
        assert not taken(tmp_path, "there")


def test_a_claim_from_the_future_is_taken_when_it_was_watched_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 0.5)
    age(write(tmp_path / "00000"), -86400)  # by a file server whose clock was set back since
    assert not taken(tmp_path)
    time.sleep(0.3)
    assert not taken(tmp_path)
    time.sleep(0.3)
    assert taken(tmp_path)


def test_time_in_which_the_watcher_itself_was_suspended_does_not_count(tmp_path, monkeypatch):
    path = write(tmp_path / "00000")
    assert not taken(tmp_path)
    monkeypatch.setattr(claims.time, "monotonic", lambda real=time.monotonic: real() + 3600)
    assert not taken(tmp_path)
    assert path.exists()


def test_a_suspended_owner_sees_that_its_claim_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_beat", lambda hearts, done: None)
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.1)
    owner = elsewhere(tmp_path)
    with owner.hold("00000"):
        assert owner.owns("00000")
        age(tmp_path / "00000", claims.STALE_S + 1)
        with Claims(tmp_path).hold("00000") as mine:
            assert mine
            time.sleep(0.25)
            assert not owner.owns("00000")
        time.sleep(0.25)
        assert not owner.owns("00000")


DAMAGED = {
    "empty": b"",
    "binary": bytes(range(128, 256)),
    "cut": b'{"host": "elsewhere", "pl',
    "a list": b"[1, 2]",
    "deep": b"[" * 10**5,
    "other kinds": b'{"host": 3, "place": "PLACE", "pid": "1", "started": [], "ticks": {}, "note": 7}',
    "a huge number": b'{"place": "PLACE", "pid": 1e400}',
    "a negative one": b'{"place": "PLACE", "pid": -5}',
}


@pytest.mark.parametrize("how", [*DAMAGED, "a folder", "a link", "a pipe", "forbidden"])
def test_a_damaged_claim_is_an_unknown_owners_until_it_is_old(tmp_path, monkeypatch, how):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    path = tmp_path / "00000"
    if how == "a folder":
        (path / "inside").mkdir(parents=True)
    elif how == "a link":
        path.symlink_to(tmp_path / "nowhere")
    elif how == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(DAMAGED.get(how, b"x").replace(b"PLACE", place().encode()))
    if how == "forbidden":
        path.chmod(0)
    assert not taken(tmp_path)
    assert Claims(tmp_path).owners() == {"00000": None}
    os.utime(path, (time.time() - claims.STALE_S - 1,) * 2, follow_symlinks=False)
    assert Claims(tmp_path).held() == set()
    assert taken(tmp_path)


def take_often(folder: str) -> None:
    """Take the dead claim; whoever has it notes that, alone."""
    (Path(folder) / f"ready.{os.getpid()}").touch()
    for number in range(200):
        name = f"{number:05}"
        with Claims(Path(folder) / "claims").hold(name) as mine:
            if mine:
                alone = Path(folder) / f"in.{name}"
                os.close(os.open(alone, os.O_CREAT | os.O_EXCL))  # FileExistsError: another one holds it, too
                alone.unlink()


def test_of_several_takers_one_has_the_claim(tmp_path):
    (tmp_path / "claims").mkdir()
    for number in range(200):
        write(tmp_path / "claims" / f"{number:05}", place=place(), pid=NOBODY)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_claims as t; "
    command = [sys.executable, "-c", code + f"t.take_often({str(tmp_path)!r})"]
    takers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [taker.communicate(timeout=120)[1] for taker in takers]
    assert [taker.returncode for taker in takers] == [0] * 4, errors
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_takeover_that_was_killed_does_not_keep_others_from_it(tmp_path):
    write(tmp_path / "00000", place=place(), pid=NOBODY)
    write(tmp_path / ".00000.takeover", place=place(), pid=NOBODY)
    assert not taken(tmp_path)  # the guard goes
    assert taken(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_buried_and_the_living_stay(tmp_path):
    write(tmp_path / "dead", place=place(), pid=NOBODY)
    write(tmp_path / ".worker.dead", place=place(), pid=NOBODY)
    with Claims(tmp_path).hold(".worker.alive", {"dtype": "float32"}) as mine:
        assert mine
        Claims(tmp_path).bury()
        assert [path.name for path in tmp_path.iterdir()] == [".worker.alive"]
        assert claims.note_of(tmp_path / ".worker.alive") == {"dtype": "float32"}
