"""Learning rate as a pure function of the step, and intervals given in steps or in samples."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stack.config import Config


def _check_span(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError("give at least 1")
    if isinstance(value, str):
        count, _, unit = value.partition(" ")
        if not count.isdigit() or unit != "samples":
            raise ValueError("give a number of steps (500) or of samples ('100000 samples')")
    return value


Span = Annotated[int | str, AfterValidator(_check_span)]
"""A length of training: a number of steps, or 'N samples'."""


def steps_of(span: int | str, batch_size: int) -> int:
    """The number of steps of a Span at this global batch size (at least 1 for any positive number of samples)."""
    if isinstance(span, int):
        return span
    return max(1, -(-int(span.split()[0]) // batch_size))


class ScheduleConfig(Config):
    steps: Span = 1000
    warmup: Span = 100
    kind: Literal["constant", "cosine"] = "constant"
    final: float = Field(default=0.1, ge=0, le=1)
    """Cosine: the rate at the end, as a share of the peak."""


def learning_rate(config: ScheduleConfig, peak: float, step: int, batch_size: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `peak`, then constant or a cosine down to final·peak."""
    warmup, total = steps_of(config.warmup, batch_size), steps_of(config.steps, batch_size)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.kind == "constant":
        return peak
    share = (step - warmup) / max(total - warmup, 1)
    return peak * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def step_of(name: str) -> int | None:
    """The step that a file or folder is named after, "00000500" for 500; None for other names."""
    return int(name) if re.fullmatch("[0-9]{8,}", name) and name == f"{int(name):08d}" else None
