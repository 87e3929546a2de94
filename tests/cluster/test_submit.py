"""submitit's jobs and sweeps on a real Slurm of two nodes (slurm/local/up.sh)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import sweep
from launch.submit import Resources, State, prepare, states, submit, submitted
from stack.log import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def until(condition: Callable[[], Any], what: str, job: Any = None, seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come about: {job.stdout() or ''}\n{job.stderr() or ''}" if job else what)


def ended(job: Any) -> State:
    def state() -> State | None:
        (found,) = states(job.paths.folder, [submitted(job)])
        return None if found.alive else found

    return until(state, "the end of the job", job)


def test_a_job_on_two_nodes_is_requeued_and_goes_on_bit_for_bit(stage, training, history):
    sections = {"parallel": {"engine": "zero", "zero_stage": 2}, "schedule": {"steps": 80}}
    undisturbed = training(stage.train_config("slurm-submit-whole", **sections), 2)
    undisturbed.finish()
    train = prepare("train", str(stage.train_config("slurm-submit", **sections)))
    resources = Resources(cluster="slurm", nodes=2, timeout_min=10)
    (job,) = submit([train], resources, train.folder / "jobs")
    for step, number in ((5, "USR2"), (20, "TERM")):  # as before a time limit; as the notice of a preemption
        until(lambda step=step: len(read_metrics(train.folder)) > step, f"step {step}", job)
        before = job.task(0).stderr().count("asked to stop, saved after step")
        subprocess.run(["scancel", f"--signal={number}", job.job_id], check=True)
        until(lambda before=before: job.task(0).stderr().count("asked to stop, saved") > before, "the save", job)
    assert ended(job) == State("finished"), job.stderr()
    assert history(train.folder) == history(undisturbed.run)
    said = job.task(0).stderr()
    assert said.count("going on after step") == 2
    assert {len(list(train.folder.glob(f"jobs/{job.job_id}_{task}_result.pkl"))) for task in (0, 1)} == {1}


def test_a_sweep_is_one_array_of_which_one_trial_fails(stage, mmdit, tmp_path):
    config = stage.train_config("slurm-sweep", schedule={"steps": 4, "warmup": 1})
    path = tmp_path / "rates.yaml"
    values = {
        "config": str(config),
        "overrides": ["run.max_nonfinite=2"],
        "parameters": {"optim.lr": [1e-4, 1e-3, 1e30, 1e-2]},
        "resources": {"cluster": "slurm", "parallel": 2, "timeout_min": 10},
    }
    path.write_text(yaml.safe_dump(values))
    folder = tmp_path / "sweep"
    done = mmdit("sweep", "run", path, "--dir", folder)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = [trial.job.id for trial in sweep._read(folder).trials]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{number}" for number in range(4)]

    done = mmdit("sweep", "status", folder, "--watch")
    assert done.returncode == 0, done.stderr
    assert "002 failed: " in done.stderr
    found = sweep.rows(folder)
    assert [row.state for row in found] == ["finished", "finished", "failed", "finished"], done.stderr
    assert "non-finite" in found[2].reason
    assert len({row.best for row in found if row.best is not None}) == 3

    done = mmdit("sweep", "run", path, "--dir", folder, "--watch")
    assert done.returncode == 1
    again = [trial.job.id for trial in sweep._read(folder).trials]
    assert [old == new for old, new in zip(jobs, again, strict=True)] == [True, True, False, True]


def test_a_sweep_is_cancelled(stage, mmdit, tmp_path):
    asked = sweep.SweepConfig(
        config=stage.train_config("slurm-cancel", schedule={"steps": 100_000}),
        parameters={"run.seed": [0, 1]},
        resources=Resources(cluster="slurm", parallel=1, timeout_min=10),
    )
    folder = tmp_path / "sweep"
    sweep.start(asked, folder)
    until(lambda: sweep.rows(folder)[0].step, "a step")
    assert "asked 2 jobs to end" in mmdit("sweep", "cancel", folder).stdout
    until(lambda: not {"queued", "running"} & {row.state for row in sweep.rows(folder)}, "the end")
    assert [(row.state, row.reason) for row in sweep.rows(folder)] == [("stopped", "Slurm: cancelled")] * 2


def test_what_slurm_refuses_is_one_line(stage, mmdit):
    config = stage.train_config("slurm-refused")
    done = mmdit("submit", "train", config, "--cluster", "slurm", "--partition", "nowhere")
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
