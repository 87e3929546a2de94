"""Locks: who holds one, and whether the holder is about to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stack.files import is_remainder, lock

HOLD = """
import os, sys, time
from pathlib import Path
from stack.files import lock
with lock(Path(sys.argv[1])) as mine:
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(float(sys.argv[2]))  # a loader process, which inherits the lock
        os._exit(0)
    print(mine, flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(path: Path, *arguments: str, job: str | None = None) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    environment |= {"SLURM_JOB_ID": job} if job else {}
    command = [sys.executable, "-c", HOLD, str(path), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def free(path: Path) -> bool:
    with lock(path) as mine:
        return mine


def test_a_lock_of_a_living_process_is_no_remainder(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    path = tmp_path / ".lock"
    with lock(path) as mine:
        assert mine
        assert not is_remainder(path)
    with holder(path):
        assert not free(path)
        assert not is_remainder(path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert not is_remainder(path)


def test_what_forked_processes_of_a_dead_holder_keep_is_a_remainder(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    path = tmp_path / ".lock"
    with holder(path, "2") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not free(path)
        assert is_remainder(path)
        deadline = time.monotonic() + 20
        while not free(path):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_earlier_life_of_the_same_job_is_a_remainder(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with holder(path, job="7"):
        assert is_remainder(path)
    with holder(path, job="8"):
        assert not is_remainder(path)
    monkeypatch.setattr("stack.files.place", lambda: "of another host")
    with holder(path, job="7"):
        assert is_remainder(path)
    path.write_bytes(b"")  # of an earlier version
    assert not is_remainder(path)
