from __future__ import annotations

import pytest

from stack.config import UserError, validate
from stack.train.schedule import ScheduleConfig, learning_rate, steps_of


def test_warm_up_then_constant_or_cosine():
    constant = ScheduleConfig(steps=100, warmup=10)
    assert [learning_rate(constant, 1.0, s, 8) for s in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = ScheduleConfig(steps=110, warmup=10, kind="cosine", final=0.1)
    assert learning_rate(cosine, 2.0, 10, 8) == 2.0
    assert learning_rate(cosine, 2.0, 60, 8) == pytest.approx(2.0 * 0.55)
    assert learning_rate(cosine, 2.0, 110, 8) == pytest.approx(0.2)


def test_spans_are_steps_or_samples():
    assert steps_of(7, 64) == 7
    assert steps_of("1000 samples", 64) == 16
    assert learning_rate(ScheduleConfig(steps=10, warmup="64 samples"), 1.0, 1, 32) == 1.0
    with pytest.raises(UserError, match="number of steps"):
        validate(ScheduleConfig, {"steps": "10 epochs"}, "x")
