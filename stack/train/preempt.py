"""Agreed stop: a signal only sets a flag; the loop asks all ranks for it at the next step, saves, and leaves.

Imports nothing that is slow, so that a command can hold signals back before it imports what it runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

EXIT_CODE = 85
"""Exit status of a run that was asked to stop and has saved: start it again and it goes on."""

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that come before somebody listens to them wait, in this process and in those that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Preemption:
    """Listens for SIGUSR1, SIGUSR2 and SIGTERM while the `with` block lasts."""

    def __enter__(self) -> Self:
        self._flag = False
        self._before = {s: signal.signal(s, self._set) for s in SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._flag = True

    def agreed(self) -> bool:
        """True on all ranks once any rank was signalled. A collective."""
        from stack import dist

        return dist.any_rank(self._flag)
