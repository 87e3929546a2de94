"""Evaluation as a service: who evaluates what, whoever is killed, stopped or late."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from stack.evaluate import watch as service
from stack.log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = [1, 2, 3, 4]
DEADLINE_S = 180


@pytest.fixture(scope="module")
def trained(stage, mmdit) -> Path:
    """A run of four steps with as many snapshots."""
    config = stage.train_config("watched", snapshot={"every": 1})
    assert mmdit("train", config).returncode == 0
    return stage.folder / "watched"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """`mmdit ARGUMENTS` in a process of its own, which shares no wandb service with this one."""
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    error = process.communicate(timeout=DEADLINE_S)[1].decode()
    return process.returncode, error


def leased(run: Path) -> list[Path]:
    return [path for path in (run / "snapshots" / ".claims").glob("[!.]*") if path.name[0].isdigit()]


def in_hand(run: Path, process: subprocess.Popen[bytes]) -> int:
    """Stop the process (SIGSTOP) in mid-evaluation; the step that it has leased."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        if leased(run):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)  # until it has stopped
            if (held := leased(run)) and not list((run / "eval").glob(f"{held[0].name[:8]}/*.json")):
                return int(held[0].name[:8])
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    raise AssertionError(process.communicate(timeout=10)[1].decode())


def evaluated(error: str) -> list[int]:
    """The steps that an evaluator says it evaluated."""
    lines = [line.partition(": {")[2] for line in error.splitlines() if ": {" in line and "eval/step" in line]
    return [json.loads("{" + line)["eval/step"] for line in lines]


def listed(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()]


def test_two_evaluators_share_the_work(run, trained):
    options = ("--watch", "--scenes", 2, "--steps", 2)
    first = start("evaluate", run, *options)
    step = in_hand(run, first)
    second = start("evaluate", run, *options)
    deadline = time.monotonic() + DEADLINE_S
    while len(list((run / "eval").glob("*/*.json"))) < 3 and time.monotonic() < deadline:
        for path in leased(run):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # the stopped one's heart beats, however long this takes
        time.sleep(0.05)
    assert second.poll() is None  # it waits for the snapshot that the first one has
    first.send_signal(signal.SIGCONT)
    (code, error), (other_code, other_error) = ended(first), ended(second)
    assert (code, other_code) == (0, 0), error + other_error
    assert step in evaluated(error)
    assert evaluated(other_error)
    assert Counter(evaluated(error) + evaluated(other_error)) == Counter(STEPS)
    assert listed(run) == STEPS
    assert not leased(run)
    values = [json.loads(line)["val_loss"] for line in (run / "eval.jsonl").read_text().splitlines()]
    expected = [line["val_loss"] for line in read_metrics(trained) if "val_loss" in line]
    assert values == pytest.approx(expected, rel=1e-5)


def test_stopped_and_killed_evaluators_leave_their_snapshot_to_others(run):
    command = ("evaluate", run, "--watch", "--scenes", 2, "--steps", 2)
    stopped = start(*command)
    in_hand(run, stopped)
    stopped.send_signal(signal.SIGTERM)
    stopped.send_signal(signal.SIGCONT)
    code, error = ended(stopped)
    assert code == 85, error
    assert not leased(run)

    killed = start(*command)
    step = in_hand(run, killed)
    killed.kill()
    other_error = ended(killed)[1]
    assert [path.name[:8] for path in leased(run)] == [f"{step:08d}"]

    code, last_error = ended(start(*command))
    assert code == 0, last_error
    assert step in evaluated(last_error)
    assert Counter(evaluated(error + other_error + last_error)) == Counter(STEPS)
    assert listed(run) == STEPS


def test_waiting_ends_with_a_signal_too(tmp_path):
    process = start("evaluate", tmp_path / "run", "--watch")
    assert process.stderr is not None
    assert b"waiting for a training to begin here" in process.stderr.readline()
    process.send_signal(signal.SIGUSR2)
    assert ended(process)[0] == 85


def test_patience_has_an_end(run, mmdit, tmp_path):
    done = mmdit("evaluate", tmp_path / "never", "--watch", "--patience", 0.0001)
    assert done.returncode == 2
    assert "never: no sign of its training for 0.0001 hours" in done.stderr
    (run / "snapshots" / "00000004.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")  # as of a training that died
    done = mmdit("evaluate", run, "--watch", "--patience", 0.0001)
    assert done.returncode == 2
    assert "no sign of its training" in done.stderr
    assert listed(run) == STEPS[:3]


def test_evaluator_and_trainer_at_once_in_one_wandb_run(stage, tmp_path):
    """The evaluator comes first, sees a trainer die and another one finish, and logs to the trainer's wandb run."""
    run = tmp_path / "run"
    sections = {"snapshot": {"every": 1}, "checkpoint": {"every": 1}, "schedule": {"steps": 6, "warmup": 2}}
    config = stage.train_config("at_once", run={"dir": str(run)}, log={"every": 1, "wandb": "offline"}, **sections)
    evaluator = start("evaluate", run, "--watch")
    trainer = start("train", config)
    deadline = time.monotonic() + DEADLINE_S
    while not (run / "snapshots" / "00000002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    trainer.kill()
    trainer.communicate()
    assert evaluator.poll() is None
    code, error = ended(start("train", config))
    assert code == 0, error
    code, error = ended(evaluator)
    assert code == 0, error
    assert listed(run) == [1, 2, 3, 4, 5, 6]

    run_id = json.loads((run / "wandb.json").read_text())["id"]
    logs = {path.read_bytes() for path in run.glob(f"wandb/offline-run-*/run-{run_id}.wandb")}
    of_evaluator = [log for log in logs if b"eval/val_loss" in log]
    assert len(of_evaluator) == 1
    for line in map(json.loads, (run / "eval.jsonl").read_text().splitlines()):
        assert repr(line["val_loss"]).encode() in of_evaluator[0]
    assert b"eval/step" in of_evaluator[0]


def test_a_snapshot_that_cannot_be_read_does_not_stop_the_others(run, mmdit, monkeypatch):
    monkeypatch.setattr(service, "POLL_S", 0.01)
    broken = run / "snapshots" / "00000002.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    done = mmdit("evaluate", run, "--watch")
    assert done.returncode == 1
    assert done.stderr.count(f"snapshot 2 failed, try {service.MAX_TRIES} of {service.MAX_TRIES}") == 1
    assert "could not evaluate the snapshots of steps 2" in done.stderr
    assert listed(run) == [1, 3, 4]
    broken.write_bytes(whole)
    done = mmdit("evaluate", run, "--watch")
    assert (done.returncode, evaluated(done.stderr)) == (0, [2])
    assert listed(run) == STEPS


def test_other_settings_are_another_evaluation(run, mmdit):
    for arguments in (("--watch",), ("--watch",), ("--step", 4), ("--step", 4, "--seed", 1)):
        assert mmdit("evaluate", run, *arguments).returncode == 0
    assert listed(run) == [*STEPS, 4]
    done = mmdit("evaluate", run, "--watch", "--step", 4)
    assert (done.returncode, "leave out --step" in done.stderr) == (2, True)


def test_tracking_that_fails_ends_no_evaluation(run, mmdit):
    (run / "wandb.json").write_text(json.dumps({"id": "lost0001"}))
    (run / "wandb").write_text("")  # where its folder would be
    done = mmdit("evaluate", run, "--watch", "log.wandb=offline")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is off") == 1
    assert listed(run) == STEPS
