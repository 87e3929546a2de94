"""How many steps the demo's trainings get of its time budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

CALIBRATION_STEPS = 36
"""Length of the short training that measures the time per step; no training gets fewer steps."""


class Need(NamedTuple):
    """What a training needs."""

    floor: int
    """Steps below which its result is not worth the rest."""
    without: str
    """What happens below."""


class Time(NamedTuple):
    """What a training has of the budget, in seconds."""

    share: float
    at_most: float
    """For the steps that it needs."""
    limit: int | None
    """The most steps, if any."""


class Plan(NamedTuple):
    """The steps of a training, and why as many."""

    steps: int
    seconds: float
    """The time that the steps have."""
    step_s: float
    """Seconds per step, as measured before."""
    spent: float = 0.0
    """Seconds of earlier tries, which were made with fewer steps."""


def step_time(times: Sequence[float]) -> float:
    """Median of the seconds per step, the first third left out: compilation and caches make the first steps slow."""
    return statistics.median(times[len(times) // 3 :])


def plan(time: Time, step_s: float, need: Need, spent: float = 0.0) -> Plan:
    """The steps that fit into the share. Where these are fewer than needed, as many of those as fit into `at_most`."""
    seconds, most = time.share - spent, time.at_most - spent
    if seconds < need.floor * step_s:
        seconds = max(seconds, min(most, need.floor * step_s))
    steps = max(CALIBRATION_STEPS, int(seconds / step_s + 1e-6))
    return Plan(min(steps, time.limit or steps), seconds, step_s, spent)


def plan_again(before: Plan, used: float, time: Time, step_s: float, need: Need) -> Plan | None:
    """A new plan for a training that ended after `used` seconds with much of its time left; else None.

    The machine was busy while the time of a step was measured, and the rest of the time is better spent on more steps
    than lost. step_s: as measured in the training that ended.
    """
    start = max(0.0, used - before.steps * step_s)  # of the process, once more
    again = plan(time, step_s, need, before.spent + used + start)
    return again._replace(spent=before.spent + used) if again.steps >= 1.5 * before.steps else None


def shortfalls(name: str, given: Plan, used: float, need: Need) -> list[str]:
    """Sentences on what a training lacked; none where it had the steps that it needs in the time that it has."""
    found, planned = [], given.steps * given.step_s
    if given.steps < need.floor:
        found.append(
            f"{name}: {given.steps:,} steps fit into its {max(given.seconds, 0):.0f} s, {given.step_s:.2f} s per step; "
            f"it needs {need.floor:,} steps, {need.floor * given.step_s:.0f} s: {need.without}. Give more --minutes"
        )
    if used > 1.5 * max(given.seconds, planned):
        found.append(
            f"{name}: {given.steps:,} steps took {used:.0f} s, {planned:.0f} s were planned: the machine was slower "
            "than when the time of a step was measured"
        )
    return found
