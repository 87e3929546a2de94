"""Thirty kills at random moments: the run ends as if there had been none."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

KILLS = 30
SECTIONS = {
    "parallel": {"engine": "zero", "zero_stage": 2},
    "schedule": {"steps": 800, "warmup": 5},
    "checkpoint": {"every": 7},
    "snapshot": {"every": 200},
    "log": {"every": 1, "wandb": "disabled", "keys": True},
}


def last_step(run: Path) -> int:
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def wait_for_save(run) -> None:
    while run.process.poll() is None and not any((run.run / "checkpoints").glob("*.tmp")):
        time.sleep(0.0005)


@pytest.mark.slow
def test_thirty_kills_change_nothing(stage, training, history):
    """Of both ranks or of one, while steps are computed and checkpoints written."""
    whole = training(stage.train_config("chaos-whole", **SECTIONS), 2)
    whole.finish()

    config = stage.train_config("chaos", **SECTIONS)
    draw = random.Random(0)
    in_a_save = kills = 0
    while True:
        run = training(config, 2)
        before = last_step(run.run)
        if kills == KILLS:
            said = run.finish()
            assert f"going on after step {before}" in said
            break
        run.wait_for_step(before + draw.randint(1, 18))
        if kills % 5 == 0:
            wait_for_save(run)
        else:
            time.sleep(draw.uniform(0, 0.05))
        in_a_save += any((run.run / "checkpoints").glob("*.tmp"))
        kills += 1
        if kills % 3:
            said = run.kill()
        else:
            draw.choice(run.ranks()).send_signal(signal.SIGKILL)
            said = run.process.communicate(timeout=60)[1]
            assert run.process.returncode not in (0, 85)
        assert "does not verify" not in said
        assert before == 0 or f"going on after step {before}" in said

    assert in_a_save > 0
    assert history(run.run) == history(whole.run)
    assert (run.run / "keys.jsonl").read_text() == (whole.run / "keys.jsonl").read_text()
    keys = [json.loads(line) for line in (run.run / "keys.jsonl").read_text().splitlines()]
    assert [line["step"] for line in keys] == list(range(1, 801))
    last = "snapshots/00000800.safetensors"
    assert (run.run / last).read_bytes() == (whole.run / last).read_bytes()
    for file in (whole.run / "checkpoints" / "00000800").glob("*.safetensors"):
        assert (run.run / "checkpoints" / "00000800" / file.name).read_bytes() == file.read_bytes()
