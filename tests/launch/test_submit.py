"""Commands as submitit's jobs on this machine: requeued exactly, failed with the reason, ended without survivors."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import launch.submit
from launch.submit import MAX_STALLS, Resources, State, prepare, states, submit, submitted

ROOT = Path(__file__).parents[2]
TWO = Resources(cluster="local", tasks_per_node=2)
ONE = Resources(cluster="local")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """Jobs start where they are submitted, with the submitter's environment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come about")


def ended(job: Any) -> State:
    def state() -> State | None:
        (found,) = states(job.paths.folder, [submitted(job)])
        return None if found.alive else found

    return until(state, f"the end of job {job.job_id}")


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def children(process: psutil.Process, word: str) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with suppress(psutil.Error):  # it has ended meanwhile
            found += [child] if word in child.cmdline() else []
    return found


def tasks(job: Any) -> list[psutil.Process]:
    return children(psutil.Process(int(job.job_id)), "submitit.core._submit")


def commands(job: Any) -> list[psutil.Process]:
    """The `mmdit` processes of a job, one a task."""
    found = []
    for task in tasks(job):
        with suppress(psutil.Error):
            found += children(task, "launch.cli")
    return found


def test_a_job_that_is_asked_to_stop_is_requeued_and_goes_on_bit_for_bit(stage, training, history):
    sections = {"parallel": {"engine": "zero", "zero_stage": 2}, "schedule": {"steps": 80}}
    undisturbed = training(stage.train_config("submit-whole", **sections), 2)
    undisturbed.finish()
    run = stage.folder / "submit-usr2"
    command = prepare("train", str(stage.train_config("submit-usr2", **sections)))
    (job,) = submit([command], TWO, command.folder / "jobs")
    for step in (5, 20):  # submitit counts each as a time-out, since the job is shorter than ten minutes
        until(lambda step=step: steps(run) > step, f"step {step}")
        stale = job.paths.submitted_pickle.with_suffix(".pkl.save_tmp")
        stale.touch()  # of a kill in the middle of submitit's writing
        before = {process.pid for process in tasks(job)}
        for task in tasks(job):
            task.send_signal(signal.SIGUSR2)
        until(lambda before=before: {p.pid for p in tasks(job)}.isdisjoint(before) and tasks(job), "the next life")
    assert ended(job) == State("finished")
    assert job.results() == [None, None]
    assert history(run) == history(undisturbed.run)
    weights = "snapshots/00000080.safetensors"
    assert (run / weights).read_bytes() == (undisturbed.run / weights).read_bytes()
    said = job.task(0).stderr()
    assert said.count("asked to stop, saved after step") == 2
    assert said.count("going on after step") == 2


def test_a_job_without_progress_is_not_requeued_for_ever(stage, mmdit):
    """An evaluation that is ended by each signal before it has written anything."""
    config = stage.train_config("submit-early", schedule={"steps": 1})
    assert mmdit("train", config).returncode == 0
    command = prepare("evaluate", str(stage.folder / "submit-early"))
    (job,) = submit([command], ONE, command.folder / "jobs")
    seen: set[int] = set()
    for _ in range(MAX_STALLS + 1):
        (process,) = until(lambda: [p for p in commands(job) if p.pid not in seen], "the command's process")
        seen.add(process.pid)
        for task in tasks(job):
            task.send_signal(signal.SIGUSR2)
        until(lambda process=process: not process.is_running(), "its end")
    state = ended(job)
    assert state.name == "failed"
    assert "asked to stop 4 times in a row before anything was saved" in state.reason
    assert not (stage.folder / "submit-early" / "eval.jsonl").exists()


def test_a_cancelled_job_saves_and_does_not_come_back(stage):
    from launch.submit import cancel

    config = stage.train_config("submit-cancel", schedule={"steps": 100_000})
    command = prepare("train", str(config))
    (job,) = submit([command], ONE, command.folder / "jobs")
    until(lambda: steps(stage.folder / "submit-cancel") > 3, "step 3")
    processes = commands(job)
    cancel(job.paths.folder, [submitted(job)])
    assert ended(job).name == "stopped"
    assert not any(process.is_running() for process in processes)
    assert list((stage.folder / "submit-cancel").glob("checkpoints/*/COMPLETE"))


def test_a_command_that_fails_is_a_job_that_fails_with_its_last_line(stage, mmdit, tmp_path):
    config = stage.train_config("submit-missing", data={"path": str(tmp_path / "nowhere")})
    done = mmdit("submit", "train", config, "--cluster", "local", "--wait")
    assert done.returncode == 1
    assert "failed: exit code 2" in done.stderr
    assert "nowhere" in done.stderr.splitlines()[-1]

    command = prepare("train", str(config))
    (job,) = submit([command], ONE, command.folder / "jobs")
    with pytest.raises(Exception, match=r"(?s)CommandError: exit code 2.*nowhere"):
        job.results()


ZERO_1 = {"engine": "zero", "zero_stage": 1}
FAIL_ONCE = """
import os, sys
if "launch.cli" in sys.orig_argv:
    try:
        open(os.path.join(os.path.dirname(__file__), f"failed-{os.environ.get('RANK')}"), "x").close()
    except FileExistsError:
        pass
    else:
        os._exit(1)
"""


def test_a_failure_that_may_pass_is_tried_again(stage, tmp_path, monkeypatch):
    """Each task's command fails once; both ranks then meet."""
    (tmp_path / "sitecustomize.py").write_text(FAIL_ONCE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    command = prepare("train", str(stage.train_config("submit-passing", schedule={"steps": 2}, parallel=ZERO_1)))
    (job,) = submit([command], TWO, command.folder / "jobs")
    assert ended(job) == State("finished")
    assert {path.name for path in tmp_path.glob("failed-*")} == {"failed-0", "failed-1"}
    assert job.task(0).stderr().count("exit code 1: again (1 of 3)") == 1


def test_a_job_that_ends_while_it_is_looked_at_has_finished(stage, monkeypatch):
    config = stage.train_config("submit-end", schedule={"steps": 2})
    command = prepare("train", str(config))
    (job,) = submit([command], ONE, command.folder / "jobs")
    look = launch.submit._controller

    def as_it_ends(folder: Path, number: str) -> Any:
        job._process.wait()
        return look(folder, number)

    monkeypatch.setattr(launch.submit, "_controller", as_it_ends)
    assert states(job.paths.folder, [submitted(job)]) == [State("finished")]


def test_when_one_task_dies_the_others_are_ended(stage):
    config = stage.train_config(
        "submit-kill", parallel={"engine": "zero", "zero_stage": 1}, schedule={"steps": 100_000}
    )
    command = prepare("train", str(config))
    (job,) = submit([command], TWO, command.folder / "jobs")
    until(lambda: steps(stage.folder / "submit-kill") > 3, "step 3")
    processes = commands(job)
    next(process for process in processes if process.environ()["RANK"] == "1").kill()
    state = ended(job)
    assert state.name == "failed"
    assert not any(process.is_running() for process in processes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "CONFIG", "optim.lrr=1"), "unknown key 'optim.lrr', did you mean 'lr'?"),
        (("train", "CONFIG", "data.path=https://user:password@host/x"), "credentials belong in the environment"),
        (("train", "CONFIG", "--rank", "2"), "No such option"),
        (("train", "CONFIG", "--nodes", "2"), "nodes=2, but cluster=local has one node"),
        (("train", "CONFIG", "--timeout-min", "1"), "timeout_min=1 leaves no time before the signal"),
        (("demo",), "'demo' is not one of 'train', 'preencode', 'evaluate'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(stage, mmdit, arguments, says):
    config = stage.train_config("submit-wrong")
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    done = mmdit("submit", *given, "--cluster", "local")
    assert done.returncode == 2
    assert says in done.stderr
    assert "password" not in done.stderr
    assert not (stage.folder / "submit-wrong").exists()


def test_an_evaluation_is_submitted_like_a_training(stage, mmdit):
    config = stage.train_config("submit-evaluate", schedule={"steps": 2})
    assert mmdit("train", config).returncode == 0
    run = stage.folder / "submit-evaluate"
    done = mmdit("submit", "evaluate", run, "--batch-size", "8", "--cluster", "local", "--wait")
    assert done.returncode == 0, (done.stderr, [path.read_text() for path in (run / "jobs").glob("*.err")])
    assert json.loads((run / "eval.jsonl").read_text())["step"] == 2
