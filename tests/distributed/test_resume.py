"""Kill it anywhere, it goes on exactly."""

from __future__ import annotations

import signal
import time

import pytest

SECTIONS = {"schedule": {"steps": 40, "warmup": 5}, "checkpoint": {"every": 20}, "snapshot": {"every": 20}}
CASES = [({"engine": "local"}, 1), ({"engine": "zero", "zero_stage": 2, "accumulate": 2}, 2)]


@pytest.mark.parametrize(("parallel", "ranks"), CASES, ids=["local", "zero2 on two ranks"])
def test_a_killed_run_goes_on_bit_for_bit(stage, training, history, parallel, ranks):
    name = f"resume-{parallel['engine']}"
    whole = training(stage.train_config(f"{name}-whole", parallel=parallel, **SECTIONS), ranks)
    whole.finish()

    config = stage.train_config(f"{name}-killed", parallel=parallel, **SECTIONS)
    killed = training(config, ranks)
    killed.wait_for_step(23)
    killed.kill()
    assert "going on after step 20" in training(config, ranks).finish()

    assert history(killed.run) == history(whole.run)
    weights = "snapshots/00000040.safetensors"
    assert (killed.run / weights).read_bytes() == (whole.run / weights).read_bytes()
    for file in (whole.run / "checkpoints" / "00000040").glob("*.safetensors"):
        assert (killed.run / "checkpoints" / "00000040" / file.name).read_bytes() == file.read_bytes()


def test_a_signalled_run_saves_exits_with_85_and_goes_on_exactly(stage, training, history):
    """Between two lines of metrics: the running means of each rank are part of the state."""
    sections = {
        "parallel": {"engine": "zero", "zero_stage": 1},
        "schedule": {"steps": 60, "warmup": 5},
        "log": {"every": 7, "wandb": "disabled"},
    }
    whole = training(stage.train_config("signal-whole", **sections), 2)
    whole.finish()
    config = stage.train_config("signal", **sections)
    signalled = training(config, 2)
    signalled.wait_for_step(7)
    signalled.process.send_signal(signal.SIGUSR1)
    assert "saved after step" in signalled.finish(code=85)
    (saved,) = (signalled.run / "checkpoints").glob("0*")
    assert (saved / "COMPLETE").exists()
    assert 7 <= int(saved.name) < 60
    training(config, 2).finish()
    assert history(signalled.run) == history(whole.run)


def test_a_signal_before_the_first_step_is_kept_for_it(stage, training):
    sections = {"parallel": {"engine": "zero"}, "schedule": {"steps": 60, "warmup": 5}}
    early = training(stage.train_config("signal-early", **sections), 2)
    deadline = time.monotonic() + 60
    while len(early.ranks()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    early.process.send_signal(signal.SIGTERM)
    assert "saved after step 1;" in early.finish(code=85)
