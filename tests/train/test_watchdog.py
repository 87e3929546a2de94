"""The watchdog ends a process that hangs, and none that was only stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

START = """
import ctypes, faulthandler, sys, time
from stack.train.watchdog import Watchdog
faulthandler.enable()
def hang():
    time.sleep(60)
def hold_the_lock():
    ctypes.PyDLL(None).sleep(60)
def work():
    for _ in range(5):
        for _ in range(10):
            time.sleep(0.1)
        watchdog.beat()
with Watchdog(2) as watchdog:
    print("begun", flush=True)
    globals()[sys.argv[1]]()
print("ended", flush=True)
"""


def start(name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", START, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("hang", 1), ("hold_the_lock", -signal.SIGABRT)])
def test_a_process_that_hangs_is_ended_with_its_stacks(name, code):
    began = time.monotonic()
    process = start(name)
    children = psutil.Process(process.pid).children()
    error = process.communicate(timeout=30)[1]
    assert process.returncode == code, error
    assert f"in {name}" in error
    assert time.monotonic() - began < 15
    psutil.wait_procs(children, timeout=3)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    if name == "hang":
        assert "Timeout (0:00:02)!" in error


def test_a_process_that_beats_is_left_alone():
    process = start("work")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n"), error


@pytest.mark.parametrize("whole", [True, False], ids=["a suspended job", "one process"])
def test_a_process_that_was_stopped_continues(whole):
    process = start("work")
    stopped = [process.pid, *(child.pid for child in psutil.Process(process.pid).children() if whole)]
    for signalled in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stopped:
            os.kill(pid, signalled)
        time.sleep(5 if signalled == signal.SIGSTOP else 0)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n"), error
