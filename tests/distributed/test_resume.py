"""Kill it anywhere, it goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stack.dist import VARIABLES

ROOT = Path(__file__).parents[2]


def start(config: Path, ranks: int) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", str(config), "--ranks", str(ranks)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes], code: int = 0) -> str:
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == code, error
    return error


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1].decode()}")


def history(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "grad_norm", "lr", "val_loss")) for line in lines]


SECTIONS = {"schedule": {"steps": 40, "warmup": 5}, "checkpoint": {"every": 20}, "snapshot": {"every": 20}}
CASES = [({"engine": "local"}, 1), ({"engine": "zero", "zero_stage": 2, "accumulate": 2}, 2)]


@pytest.mark.parametrize(("parallel", "ranks"), CASES, ids=["local", "zero2 on two ranks"])
def test_a_killed_run_goes_on_bit_for_bit(stage, parallel, ranks):
    name = f"resume-{parallel['engine']}"
    whole = stage.train_config(f"{name}-whole", parallel=parallel, **SECTIONS)
    finish(start(whole, ranks))

    killed = stage.train_config(f"{name}-killed", parallel=parallel, **SECTIONS)
    run = stage.folder / f"{name}-killed"
    process = start(killed, ranks)
    wait_for_step(run, 23, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [path.name for path in (run / "checkpoints").glob("0*") if path.suffix != ".tmp"] == ["00000020"]
    assert "going on after step 20" in finish(start(killed, ranks))

    expected = stage.folder / f"{name}-whole"
    assert history(run) == history(expected)
    weights = "snapshots/00000040.safetensors"
    assert (run / weights).read_bytes() == (expected / weights).read_bytes()
    for file in (expected / "checkpoints" / "00000040").glob("*.safetensors"):
        assert (run / "checkpoints" / "00000040" / file.name).read_bytes() == file.read_bytes()


def test_a_signalled_run_saves_exits_with_85_and_goes_on_exactly(stage):
    """Between two lines of metrics: the running means of each rank are part of the state."""
    sections = {
        "parallel": {"engine": "zero", "zero_stage": 1},
        "schedule": {"steps": 60, "warmup": 5},
        "log": {"every": 7, "wandb": "disabled"},
    }
    finish(start(stage.train_config("signal-whole", **sections), 2))
    config = stage.train_config("signal", **sections)
    run = stage.folder / "signal"
    process = start(config, 2)
    wait_for_step(run, 7, process)
    process.send_signal(signal.SIGUSR1)
    assert "saved after step" in finish(process, code=85)
    (saved,) = (run / "checkpoints").glob("0*")
    assert (saved / "COMPLETE").exists()
    assert 7 <= int(saved.name) < 60
    finish(start(config, 2))
    assert history(run) == history(stage.folder / "signal-whole")
