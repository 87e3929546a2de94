"""End a rank that makes no progress, with its stack traces."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

# Runs beside a rank. Argument: the rank's process, how many ticks, seconds per tick; a pulse of the rank on standard
# input per tick. A rank that holds the interpreter's lock for ever sends none; one that is stopped is waited for.
_SENTINEL = """
import os, select, signal, sys, time
rank, ticks, tick = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def stopped():
    try:
        with open(f"/proc/{rank}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False
missed = 0
while missed < ticks:
    if select.select([0], [], [], tick)[0]:
        missed = 0
        if not os.read(0, 4096):
            sys.exit()
    elif not stopped():
        missed += 1
    if os.getppid() != rank:
        sys.exit()
os.kill(rank, signal.SIGABRT)
for _ in range(50):
    time.sleep(0.1)
    if os.getppid() != rank:
        sys.exit()
os.kill(rank, signal.SIGKILL)
"""


class Watchdog:
    """While the `with` block lasts, a process that does not `beat` for so many seconds writes the stack traces of all
    its threads to standard error and exits with status 1.

    A rank that hangs holds all others in their next collective, so each rank's own watchdog is enough to end them all,
    and the launcher kills one that cannot run at all (SIGSTOP).

    Only time in which the process could run counts: a job that is suspended (SIGSTOP to all its processes) continues
    afterwards. For that a thread counts short intervals, each with twice its length at most. Where no thread of Python
    can run, since C code holds the interpreter's lock, a small process beside this one aborts it (SIGABRT).
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._tick = min(1.0, seconds / 8)
        self._beats = 0
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        arguments = (str(os.getpid()), str(round(self._seconds / self._tick)), str(self._tick))
        self._sentinel = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SENTINEL, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._sentinel.kill()
        self._sentinel.wait()
        with suppress(OSError):
            assert self._sentinel.stdin is not None
            self._sentinel.stdin.close()

    def beat(self) -> None:
        self._beats += 1

    def _watch(self) -> None:
        assert self._sentinel.stdin is not None
        pipe = self._sentinel.stdin.fileno()
        os.set_blocking(pipe, False)
        seen, left, last = self._beats, self._seconds, time.monotonic()
        while not self._ended.wait(self._tick):
            now = time.monotonic()
            left -= min(now - last, 2 * self._tick)
            last = now
            if self._beats != seen:
                seen, left = self._beats, self._seconds
            with suppress(OSError):  # it is stopped, or was ended with a signal to all processes
                os.write(pipe, b".")
            if left <= 0:
                self._end()

    def _end(self) -> None:
        stream = sys.__stderr__ or sys.stderr
        stream.write(f"Timeout ({timedelta(seconds=self._seconds)})!\n")
        stream.flush()
        faulthandler.dump_traceback(stream)
        os._exit(1)
