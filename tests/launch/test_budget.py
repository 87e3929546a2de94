"""The steps of the demo's trainings, from made step times."""

from __future__ import annotations

import pytest

from launch.budget import CALIBRATION_STEPS, Need, Time, plan, plan_again, shortfalls, step_time

NEED = Need(1000, "nothing is to be seen")
SHARE, MOST = 290.0, 660.0  # of 22 minutes
TIME = Time(SHARE, MOST, None)
LIMITED = Time(SHARE, MOST, 3600)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.07] * 36, 0.07),
        ([30.0] + [0.07] * 35, 0.07),  # the first step compiles
        ([30.0, 5.0, 2.0, 1.0] + [0.07] * 32, 0.07),
        ([0.07] * 20 + [0.7] * 6 + [0.07] * 10, 0.07),  # a neighbour for a moment
        ([0.07] * 35 + [30.0], 0.07),
        ([0.7] * 36, 0.7),
        ([0.3], 0.3),
        ([0.2, 0.4], 0.3),
    ],
)
def test_the_time_of_a_step(times, expected):
    assert step_time(times) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step_s", "limit", "steps", "seconds"),
    [
        (0.07, None, 4142, SHARE),
        (0.07, 3600, 3600, SHARE),  # as the configuration says
        (0.29, None, 1000, SHARE),
        (0.5, None, 1000, 500.0),  # more than its share, for the steps that it needs
        (0.5, 3600, 1000, 500.0),
        (0.7, None, 942, MOST),
        (7.0, None, 94, MOST),
        (100.0, None, CALIBRATION_STEPS, MOST),
    ],
)
def test_a_training_gets_its_share_or_what_it_needs(step_s, limit, steps, seconds):
    chosen = plan(Time(SHARE, MOST, limit), step_s, NEED)
    assert (chosen.steps, chosen.seconds) == (steps, pytest.approx(seconds))
    said = shortfalls("autoencoder", chosen, 0, NEED)
    assert len(said) == (steps < NEED.floor)
    if said:
        assert f"{steps:,} steps fit into its 660 s" in said[0]
        assert f"needs 1,000 steps, {1000 * step_s:.0f} s: nothing is to be seen" in said[0]


def test_no_time_left_is_said():
    chosen = plan(Time(-20.0, -20.0, None), 0.5, NEED)
    assert chosen.steps == CALIBRATION_STEPS
    assert "36 steps fit into its 0 s" in shortfalls("train", chosen, 0, NEED)[0]


def test_a_training_that_ends_early_is_planned_again():
    """The neighbour was busy while the 36 steps were measured: 942 steps for 660 s took 66 of them."""
    busy = plan(TIME, 0.7, NEED)
    assert (busy.steps, busy.seconds) == (942, MOST)
    again = plan_again(busy, 76.0, TIME, 0.07, NEED)
    assert again is not None
    assert again.steps == pytest.approx((SHARE - 76 - 10) / 0.07, rel=0.01)
    assert again.spent == 76
    assert not shortfalls("autoencoder", again, 214.0, NEED)
    assert plan_again(again, 10 + 0.07 * again.steps, TIME, 0.07, NEED) is None
    limited = plan_again(busy, 76.0, Time(900.0, 900.0, 3600), 0.07, NEED)
    assert limited is not None
    assert limited.steps == 3600


@pytest.mark.parametrize(
    ("used", "step_s"),
    [
        (300.0, 0.07),  # as long as planned
        (150.0, 0.035),  # more than half of its time
        (3000.0, 0.7),  # slower than planned
    ],
)
def test_a_training_is_not_repeated_for_little(used, step_s):
    assert plan_again(plan(TIME, 0.07, NEED), used, TIME, step_s, NEED) is None
    assert plan_again(plan(LIMITED, 0.07, NEED), 60.0, LIMITED, 0.01, NEED) is None  # all that are wanted
    short = plan(Time(13.2, 30.0, None), 0.07, NEED)  # most of it is the start of the process
    assert plan_again(short, 25.0, Time(13.2, 30.0, None), 0.01, NEED) is None


def test_a_machine_that_became_slower_is_said():
    chosen = plan(TIME, 0.07, NEED)
    assert not shortfalls("train", chosen, 400.0, NEED)
    (said,) = shortfalls("train", chosen, 2900.0, NEED)
    assert "4,142 steps took 2900 s, 290 s were planned" in said
