"""What a training does when something around it fails."""

from __future__ import annotations

import json
import resource
import signal
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

ZERO = {"parallel": {"engine": "zero", "zero_stage": 2}}


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them lives, after a moment for those that notice their parent's death by themselves."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


def test_a_hung_rank_ends_all_with_their_stacks(stage, training):
    """SIGSTOP: the other rank waits in a collective, writes where, and ends; the launcher kills the stopped one."""
    sections = {"schedule": {"steps": 5000, "warmup": 5}, "run": {"dir": str(stage.folder / "hung"), "watchdog_s": 8}}
    hung = training(stage.train_config("hung", **ZERO, **sections, data={"workers": 1}), 2)
    hung.wait_for_step(3)
    processes = children(hung.process.pid)
    hung.ranks()[1].send_signal(signal.SIGSTOP)
    error = hung.process.communicate(timeout=90)[1]
    assert hung.process.returncode == 1, error
    assert "Timeout (0:00:08)!" in error
    assert "in train" in error
    assert gone(processes)


def test_no_process_outlives_a_killed_launcher(stage, training):
    run = training(stage.train_config("orphans", **ZERO, schedule={"steps": 5000}, data={"workers": 1}), 2)
    run.wait_for_step(2)
    processes = children(run.process.pid)
    assert len(processes) >= 4
    run.process.kill()
    run.process.communicate()
    assert gone(processes)


def test_a_full_disk_ends_no_run(stage, training):
    """No file may grow to the size of a checkpoint or snapshot, until the run waits for room at its end."""

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    config = stage.train_config("full", schedule={"steps": 6, "warmup": 1}, checkpoint={"every": 3})
    full = training(config, 1, preexec_fn=no_room)
    said = until_said(full, "trying again")
    assert "checkpoint 3 failed" in said
    assert "snapshot 6 failed" in said
    assert not list((full.run / "checkpoints").glob("0*"))
    resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    full.finish()
    assert (full.run / "checkpoints" / "00000006" / "COMPLETE").exists()
    assert (full.run / "snapshots" / "00000006.safetensors").exists()


@pytest.mark.slow
def test_a_disk_that_stays_full_is_the_failure_of_the_run(stage, training):
    """The same command trains again once there is room."""

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    config = stage.train_config("stays-full", schedule={"steps": 6, "warmup": 1}, checkpoint={"every": 3})
    full = training(config, 1, preexec_fn=no_room)
    said = full.process.communicate(timeout=600)[1]
    assert full.process.returncode == 1, said
    assert "checkpoint 3 failed" in said
    assert "checkpoint 6 failed" in said
    assert "snapshot 6 failed" in said
    assert not list((full.run / "checkpoints").glob("0*"))
    again = training(config, 1)
    assert "failed" not in again.finish()
    assert (again.run / "checkpoints" / "00000006" / "COMPLETE").exists()


def until_said(run, words: str) -> str:
    """Its standard error up to the line with `words`."""
    lines = []
    for line in run.process.stderr:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} was not said: {''.join(lines)}")


def test_a_rank_that_cannot_read_a_checkpoint_ends_all_alike_and_nothing_is_lost(stage, training):
    """Its own file of the newest one, by a link to itself: both ranks end with the reason, a retry goes on from it."""
    sections = {"schedule": {"steps": 6, "warmup": 1}, "checkpoint": {"every": 2, "keep": 2}}
    config = stage.train_config("unreadable", **ZERO, **sections)
    training(config, 2).finish()
    run = stage.folder / "unreadable"
    file = run / "checkpoints" / "00000006" / "rank-00001.safetensors"
    file.rename(run / "aside")
    file.symlink_to(file.name)
    before = (run / "metrics.jsonl").read_bytes()
    said = training(config, 2).finish(code=1)
    assert "Too many levels of symbolic links" in said
    assert "start again when the checkpoints can be read" in said
    assert "Traceback" not in said
    file.unlink()
    (run / "aside").rename(file)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "going on after step 6" in training(config, 2).finish()


def test_a_disk_that_is_full_for_one_rank_spoils_no_checkpoint(stage, training):
    """The ranks agree that a save failed, and on the next one that works."""
    sections = {"schedule": {"steps": 400, "warmup": 1}, "checkpoint": {"every": 20, "keep": 3}}
    run = training(stage.train_config("full-rank", **ZERO, **sections), 2)
    run.wait_for_step(20)
    other = run.ranks()[1].pid
    resource.prlimit(other, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    run.wait_for_step(120)
    resource.prlimit(other, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = run.finish()
    assert "File too large" in said
    assert "training goes on" in said
    kept = sorted(path.name for path in (run.run / "checkpoints").glob("0*"))
    assert kept == ["00000360", "00000380", "00000400"]
    for name in kept:
        record = json.loads((run.run / "checkpoints" / name / "COMPLETE").read_text())
        assert [file["name"] for file in record["files"]] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert "does not verify" not in training(stage.train_config("full-rank", **ZERO, **sections), 2).finish()


def test_the_death_of_wandb_s_service_ends_no_run(stage, training, history):
    sections = {"schedule": {"steps": 600, "warmup": 1}}
    run = training(stage.train_config("wandb-dead", log={"every": 1, "wandb": "offline"}, **sections), 1)
    run.wait_for_step(3)
    services = [p for p in children(run.process.pid) if "wandb" in " ".join(p.cmdline())]
    assert services
    for service in services:
        service.kill()
    said = run.finish()
    assert "wandb is off from here" in said
    whole = training(stage.train_config("wandb-none", **sections), 1)
    whole.finish()
    assert history(run.run) == history(whole.run)


def test_an_unreachable_wandb_server_ends_no_run(stage, training):
    unreachable = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "5",
    }
    config = stage.train_config("wandb-unreachable", log={"wandb": "online"})
    run = training(config, 1, unreachable)
    assert "wandb is off" in run.finish()
    assert (run.run / "checkpoints" / "00000004" / "COMPLETE").exists()


CANARIES = {
    "SLURM_JWT": "canary.slurm.token",
    "WANDB_API_KEY": "c0ffee" * 6 + "c0ff",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret0123456789",
    "HF_TOKEN": "hf_canarytoken0123456789",
    "MY_DATABASE_PASSWORD": "canary-in-the-environment",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_no_secret_is_in_any_file_of_a_run(stage, training):
    """Planted in the environment of all its processes, and in a data set's URL that the configuration holds."""
    secret = "canary-in-a-url"
    keys = {"log": {"every": 1, "wandb": "offline"}, "checkpoint": {"every": 2}}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(stage.encoded))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = {
            "path": f"http://someone:{secret}@127.0.0.1:{server.server_port}",
            "cache": {"dir": str(stage.folder / "secrets" / "cache")},
        }
        run = training(stage.train_config("secrets", data=data, **ZERO, **keys), 2, CANARIES)
        said = run.finish()
        server.shutdown()
    files = [path for path in run.run.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert any(path.name == "COMPLETE" for path in files)
    assert any(path.suffix == ".tar" for path in files)
    for canary in (secret, *CANARIES.values()):
        assert canary not in said
        for path in files:
            assert canary.encode() not in path.read_bytes(), path
