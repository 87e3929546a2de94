"""Reading, encoding and writing go on at one time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from stack.data.safety import Rejected
from stack.preencode.pipeline import overlapped

PATIENCE_S = 5.0


class Meeting:
    """Encoders that are done with a chunk once the next one is read and the one before is in the caller's hand."""

    def __init__(self, chunks: int) -> None:
        self.read = [threading.Event() for _ in range(chunks)]
        self.handed = [threading.Event() for _ in range(chunks)]
        self.met: list[tuple[bool, bool]] = []

    def encode(self, items: list[Any]) -> list[Any]:
        number = len(self.met)
        following = self.read[min(number + 1, len(self.read) - 1)]
        self.met.append((following.wait(PATIENCE_S), number == 0 or self.handed[number - 1].wait(PATIENCE_S)))
        return items


def test_reading_and_writing_go_on_beside_the_encoders():
    encoders: Any = Meeting(chunks=5)

    def items() -> Iterator[Any]:
        for number in range(14):  # the last chunk is not full
            if number % 3 == 2 or number == 13:
                encoders.read[number // 3].set()
            yield Rejected(f"{number:02}", "")

    keys = []
    for number, outcomes in enumerate(overlapped(items(), encoders, 3)):
        encoders.handed[number].set()
        keys += [outcome.key for outcome in outcomes]
    assert keys == [f"{number:02}" for number in range(14)]
    assert encoders.met == [(True, True)] * 5
