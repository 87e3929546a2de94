"""Sweeps on this machine: three results and one named failure, going on, cancelling; nothing wrong is submitted."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from launch import sweep
from launch.submit import Resources, State, Submitted, _controller
from launch.sweep import Record, SweepConfig, Trial
from stack import config as configuration
from stack.config import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_trial_that_outlived_its_sweep_keeps_its_gpus(monkeypatch, tmp_path):
    """The trial in the second slot still runs when `sweep run` comes back: the next one gets the first slot."""
    job = Submitted(cluster="local", id="1", tasks=1)
    old = [Trial(name=f"{n:03d}", values={}, steps=1, fingerprint="", job=job, slot=n) for n in range(2)]
    new = Trial(name="002", values={}, steps=1, fingerprint="")
    resources = Resources(cluster="local", parallel=2, gpus_per_node=1)
    asked = SweepConfig(config=tmp_path, parameters={"x": [1]}, resources=resources)
    record = Record(sweep=asked, trials=[*old, new])
    ended, running = State("finished"), State("running")
    states = iter([[ended, running, None], [ended, ended, ended]])
    given: list[int] = []
    monkeypatch.setattr(sweep, "_states", lambda folder, record: next(states))
    monkeypatch.setattr(sweep, "_submit", lambda folder, record, todo, slot: given.append(slot))
    monkeypatch.setattr(sweep, "rows", lambda folder: [])
    monkeypatch.setattr(sweep, "POLL_S", 0)
    sweep._run_here(tmp_path, record, [2], lambda rows: None)
    assert given == [0]


def write(path: Path, **values) -> Path:
    path.write_text(yaml.safe_dump({"resources": {"cluster": "local"}, **values}), encoding="utf-8")
    return path


def test_one_trial_of_four_fails_and_the_others_have_results(stage, mmdit, tmp_path):
    """A learning rate of 1e30 makes weights that are not finite."""
    config = stage.train_config("sweep", schedule={"steps": 6, "warmup": 1}, snapshot={"every": 2})
    path = write(
        tmp_path / "rates.yaml",
        config=str(config),
        overrides=["run.max_nonfinite=2"],
        parameters={"optim.lr": [1e-4, 1e-3, 1e30, 1e-2]},
    )
    folder = tmp_path / "sweep"
    done = mmdit("sweep", "run", path, "--dir", folder)
    assert done.returncode == 1, done.stderr
    assert "002 failed: " in done.stderr
    assert done.stderr.index("000 finished") < done.stderr.index("001 running")  # one at a time

    found = sweep.rows(folder)
    assert [row.state for row in found] == ["finished", "finished", "failed", "finished"]
    assert "exit code 1" in found[2].reason
    assert "non-finite" in found[2].reason
    for row in (found[0], found[1], found[3]):
        assert (row.step, row.steps, [step for step, _ in row.curve]) == (6, 6, [2, 4, 6])
        assert row.best == min(value for _, value in row.curve)
    assert len({row.best for row in found}) == 4

    shown = mmdit("sweep", "status", folder).stdout
    assert shown.count("finished") == 3
    assert "non-finite" in shown
    assert f"{found[3].best:.4f}" in shown

    assert mmdit("sweep", "results", folder).returncode == 0
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert [line["optim.lr"] for line in lines] == ["0.0001", "0.001", "1e+30", "0.01"]
    assert [line["state"] for line in lines] == ["finished", "finished", "failed", "finished"]
    assert float(lines[3]["best val_loss"]) == found[3].best
    assert np.asarray(Image.open(folder / "results.png").convert("L")).std() > 5

    before = yaml.safe_load((folder / "sweep.yaml").read_text())["trials"]
    assert mmdit("sweep", "run", path, "--dir", folder, "metric.name=loss").returncode == 1
    after = yaml.safe_load((folder / "sweep.yaml").read_text())["trials"]
    assert [old["job"] == new["job"] for old, new in zip(before, after, strict=True)] == [True, True, False, True]
    assert sweep.rows(folder)[0].curve[0][0] == 1  # the other metric, of every step

    done = mmdit("sweep", "run", path, "--dir", folder, "overrides=[run.max_nonfinite=3]")
    assert done.returncode == 2
    assert "holds another sweep" in done.stderr


def test_a_cancelled_sweep_goes_on_where_it_was(stage, mmdit, tmp_path):
    config = stage.train_config("sweep-cancel", schedule={"steps": 150, "warmup": 1})
    path = write(tmp_path / "seeds.yaml", config=str(config), parameters={"run.seed": [0, 1]})
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch.cli", "sweep", "run", str(path), "--dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (folder / "runs" / "000" / "metrics.jsonl").exists() or not sweep.rows(folder)[0].step:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    done = mmdit("sweep", "run", path, "--dir", folder)
    assert done.returncode == 2
    assert "another process runs the trials" in done.stderr
    job = sweep._read(folder).trials[0].job
    assert _controller(folder / "jobs", job.id)

    assert "asked 1 job to end" in mmdit("sweep", "cancel", folder).stdout
    assert process.wait(120) == 1
    assert [row.state for row in sweep.rows(folder)] == ["stopped", "waiting"]
    assert not _controller(folder / "jobs", job.id)
    stopped = sweep.rows(folder)[0].step
    assert 0 < stopped < 150

    done = mmdit("sweep", "run", path, "--dir", folder)
    assert done.returncode == 0, done.stderr
    assert [(row.state, row.step) for row in sweep.rows(folder)] == [("finished", 150)] * 2
    logs = "".join(path.read_text() for path in (folder / "jobs").glob("*.err"))
    assert f"going on after step {stopped}" in logs


def test_random_draws_are_those_of_the_seed():
    parameters = {
        "optim.lr": {"log_uniform": [1e-5, 1e-2]},
        "objective.dropout.all": {"uniform": [0, 0.5]},
        "objective.model.depth": {"integer": [2, 4]},
        "schedule.kind": ["constant", "cosine"],
    }

    def draws(seed: int) -> list[dict]:
        values = {"config": "x.yaml", "parameters": parameters, "trials": 200, "seed": seed}
        return configuration.validate(sweep.SweepConfig, values, "test").draws()

    first = draws(0)
    assert first == draws(0) != draws(1)
    rates = np.array([draw["optim.lr"] for draw in first])
    assert 1e-5 <= rates.min() < 2e-5
    assert 5e-3 < rates.max() <= 1e-2
    assert abs(np.log(rates).mean() - np.log(10**-3.5)) < 0.5
    assert {draw["objective.model.depth"] for draw in first} == {2, 3, 4}
    assert {draw["schedule.kind"] for draw in first} == {"constant", "cosine"}
    assert all(0 <= draw["objective.dropout.all"] <= 0.5 for draw in first)


def test_a_grid_is_every_combination():
    values = {"config": "x.yaml", "parameters": {"a": [1, 2], "b": [[0.9, 0.95], [0.9, 0.99]], "c": [None]}}
    found = configuration.validate(sweep.SweepConfig, values, "test").draws()
    assert [(draw["a"], draw["b"][1]) for draw in found] == [(1, 0.95), (1, 0.99), (2, 0.95), (2, 0.99)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"parameters": {"optim.lrr": [1]}}, "unknown key 'optim.lrr', did you mean 'lr'?"),
        ({"parameters": {"optim.lr": ["fast"]}}, "optim.lr"),
        ({"parameters": {"data.batch_size": [8, 7]}, "resources": {"tasks_per_node": 2}}, "batch_size 7"),
        ({"parameters": {}}, "parameters: name one at least"),
        ({"parameters": {"optim.lr": 1e-3}}, "optim.lr: give a list of values"),
        ({"parameters": {"optim.lr": []}}, "parameters.optim.lr.choice: List should have at least 1 item"),
        ({"parameters": {"optim.lr": {"uniform": [0, 1]}}}, "optim.lr is drawn at random, so give trials"),
        ({"parameters": {"optim.lr": {"log_uniform": [0, 1]}}, "trials": 2}, "expected low < high and both positive"),
        ({"parameters": {"optim.lr": {"unifrom": [0, 1]}}, "trials": 2}, "did you mean 'uniform'?"),
        (
            {"parameters": {"optim.lr": {"uniform": [0, 1], "integer": [1, 2]}}, "trials": 2},
            "parameters.optim.lr: give one of choice",
        ),
        ({"parameters": {"run.dir": ["a", "b"]}}, "run.dir is each trial's own folder"),
        ({"parameters": {"optim.lr": [1]}, "metrics": {}}, "did you mean 'metric'?"),
        ({"parameters": {"optim.lr": [1]}, "config": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
        ({"parameters": {"data.path": ["https://u:secret@host/a", "b"]}}, "credentials"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_submitted(stage, mmdit, tmp_path, values, says):
    values["resources"] = {"cluster": "local", **values.get("resources", {})}
    path = write(tmp_path / "sweep.yaml", **{"config": str(stage.train_config("sweep-wrong")), **values})
    done = mmdit("sweep", "run", path, "--dir", tmp_path / "out")
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1
    assert "secret" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_trials(stage, mmdit, tmp_path):
    path = write(tmp_path / "s.yaml", config=str(stage.train_config("sweep-dry")), parameters={"run.seed": [3, 4]})
    done = mmdit("sweep", "run", path, "--dir", tmp_path / "out", "--dry-run")
    assert done.stdout.splitlines() == ["000  run.seed=3", "001  run.seed=4"]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_sweep(mmdit, tmp_path):
    for name in ("status", "results", "cancel"):
        done = mmdit("sweep", name, tmp_path)
        assert done.returncode == 2
        assert "there is no sweep.yaml" in done.stderr


def test_from_python(stage, tmp_path):
    config = stage.train_config("sweep-python", schedule={"steps": 2, "warmup": 1})
    asked = sweep.SweepConfig(
        config=config,
        parameters={"optim.lr": [1e-3, 1e-4]},
        resources=Resources(cluster="local", parallel=2),
    )
    alive: list[int] = []
    sweep.start(asked, tmp_path / "out", lambda rows: alive.append(sum(row.state == "running" for row in rows)))
    assert [row.state for row in sweep.rows(tmp_path / "out")] == ["finished"] * 2
    assert max(alive) == 2
    with pytest.raises(UserError, match="another sweep"):
        sweep.start(asked.model_copy(update={"overrides": ("run.seed=1",)}), tmp_path / "out")
