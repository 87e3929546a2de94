"""A rank that makes no progress says where it stands, and ends."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """While the `with` block lasts, a process that does not `beat` for so many seconds writes the stacks of all its
    threads to standard error and exits with status 1.

    A rank that hangs holds all others in their next collective, so each rank's own watchdog is enough to end them all,
    and the launcher kills one that cannot run at all (SIGSTOP). The clock is a thread of the interpreter's core, which
    no lock of Python stops.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or sys.stderr)
