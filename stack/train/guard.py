"""Non-finite steps: skipped on all ranks by the engine, counted here, and a run of them ends the training."""

from __future__ import annotations

from stack import dist
from stack.log import say


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


class Guard:
    def __init__(self, max_in_a_row: int, skipped: int = 0, in_a_row: int = 0):
        self.max_in_a_row = max_in_a_row
        self.skipped = skipped
        self.in_a_row = in_a_row

    def check(self, applied: bool, step: int, keys: list[str]) -> None:
        """Count the step; NonFiniteError after `max_in_a_row` skipped ones, naming the last batch's sample keys."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied:
            return
        self.skipped += 1
        say(f"step {step}: the gradient is not finite, step skipped ({self.in_a_row} in a row)")
        if self.in_a_row >= self.max_in_a_row:
            batch = sorted(key for of_rank in dist.all_gather(keys) for key in of_rank)
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a non-finite gradient; samples of step {step}: {', '.join(batch)}"
            )
