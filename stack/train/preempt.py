"""Agreed stop: a signal only sets a flag; the loop asks all ranks for it at the next step, saves, and leaves."""

from __future__ import annotations

import signal
from types import FrameType

from stack import dist

EXIT_CODE = 85
"""Exit status of a run that was asked to stop and has saved: start it again and it goes on."""


class Preemption:
    """Listens for SIGUSR1, SIGUSR2 and SIGTERM while the `with` block lasts."""

    SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

    def __enter__(self) -> Preemption:
        self._flag = False
        self._before = {s: signal.signal(s, self._set) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._flag = True

    def agreed(self) -> bool:
        """True on all ranks once any rank was signalled. A collective."""
        return dist.any_rank(self._flag)
