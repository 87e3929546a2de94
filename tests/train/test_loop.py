"""What a training does when the disk, a picture or a validation fails, and what a kill leaves to its next life."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stack.config import UserError
from stack.files import temporary_name
from stack.train import loop
from stack.train.class_to_image import ClassToImage

Recipe = Callable[..., Path]


@pytest.fixture
def recipe(labelled_data: dict[str, Any], tmp_path: Path) -> Recipe:
    """A small training in tmp_path / name: eight steps, a checkpoint every two, a snapshot every four."""

    def write(name: str, **sections: dict[str, Any]) -> Path:
        values: dict[str, Any] = {
            "run": {"dir": str(tmp_path / name)},
            "data": labelled_data,
            "objective": {
                "kind": "class_to_image",
                "model": {"kind": "dit", "patch_size": 4, "width": 32, "depth": 1, "num_heads": 2},
                "classes": 2,
                "preview": {"count": 4, "steps": 2},
            },
            "schedule": {"steps": 8, "warmup": 2},
            "checkpoint": {"every": 2, "keep": 9},
            "snapshot": {"every": 4},
            "log": {"every": 1, "wandb": "disabled"},
        }
        for section, keys in sections.items():
            values[section] = {**values[section], **keys}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def contents(run: Path) -> dict[str, bytes]:
    """All files that are the same in each life of a training."""
    paths = [*run.glob("checkpoints/*/*.safetensors"), *run.glob("snapshots/*.safetensors"), *run.glob("samples/*.png")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def validations(run: Path) -> list[tuple[int, float | None]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]


@pytest.mark.parametrize("step", [4, 8])
def test_a_kill_after_a_checkpoint_leaves_the_rest_of_its_step_to_the_next_life(recipe, mmdit, tmp_path, history, step):
    assert mmdit("train", recipe("whole")).returncode == 0
    whole, run = tmp_path / "whole", tmp_path / "cut"
    parts = {"checkpoints": "", "snapshots": ".safetensors", "samples": ".png"}
    later = [f"{part}/{name:08d}{end}" for name in (6, 8) if name > step for part, end in parts.items()]
    lost = {"picture": [f"samples/{step:08d}.png"], "snapshot": [f"snapshots/{step:08d}.safetensors"], "val_loss": []}
    lost["all"] = [*lost["picture"], *lost["snapshot"]]
    for name, missing in lost.items():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for path in (run / relative for relative in (*later, *missing)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if name in ("val_loss", "all"):
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            lines = [line for line in lines if json.loads(line)["step"] <= step]
            (run / "metrics.jsonl").write_text("".join(lines[:-1]))
        done = mmdit("train", recipe("cut"))
        assert (done.returncode, f"going on after step {step}" in done.stderr) == (0, True)
        assert history(run) == history(whole), name
        assert contents(run) == contents(whole), name


@pytest.mark.parametrize("method", ["preview", "validate"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("odd"), OSError(5, "EIO")])
def test_a_picture_or_validation_that_raises_ends_no_run(recipe, mmdit, tmp_path, monkeypatch, method, error):
    def raises(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ClassToImage, method, raises)
        done = mmdit("train", recipe("run"))
    assert done.returncode == 0, done.stderr
    what = "picture" if method == "preview" else "validation"
    for step in (4, 8):
        assert f"step {step}: the {what} failed ({type(error).__name__}: " in done.stderr
    files = set(contents(tmp_path / "run"))
    for step in (4, 8):
        assert {f"checkpoints/{step:08d}/rank-00000.safetensors", f"snapshots/{step:08d}.safetensors"} <= files
    found = validations(tmp_path / "run")
    assert [step for step, _ in found] == [4, 8]
    assert all((value is None) == (method == "validate") for _, value in found)
    assert ("samples/00000008.png" in files) == (method == "validate")


def test_a_mistake_that_only_drawing_finds_is_found_before_the_first_step(recipe, mmdit, tmp_path, monkeypatch):
    def refuses(*arguments: object) -> None:
        raise UserError("objective.preview: no such solver")

    monkeypatch.setattr(ClassToImage, "preview", refuses)
    done = mmdit("train", recipe("run"))
    assert (done.returncode, "objective.preview: no such solver" in done.stderr) == (2, True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_trying_the_preview_changes_no_bit(recipe, mmdit, tmp_path, monkeypatch):
    assert mmdit("train", recipe("tried")).returncode == 0
    monkeypatch.setattr(loop, "_try_preview", lambda *arguments: None)
    assert mmdit("train", recipe("untried")).returncode == 0
    assert contents(tmp_path / "tried") == contents(tmp_path / "untried")


def test_a_last_save_that_fails_is_the_failure_of_the_run(recipe, mmdit, tmp_path, monkeypatch):
    """No file may grow to the size of a checkpoint. With room again, the same command makes up for it."""
    monkeypatch.setattr(loop, "TRIES", 2)
    config, run = recipe("full"), tmp_path / "full"
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        done = mmdit("train", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.returncode == 1
    assert "checkpoint 8 could not be saved" in done.stderr.splitlines()[-1]
    assert done.stderr.count("checkpoint 8 failed") == 2
    assert done.stderr.count("checkpoint 6 failed") == 1  # the training goes on
    assert done.stderr.count("snapshot 8 failed") == 2
    assert [step for step, _ in validations(run)] == [4, 8]
    assert not [path for path in contents(run) if not path.startswith("samples")]
    assert mmdit("train", config).returncode == 0
    assert mmdit("train", recipe("whole")).returncode == 0
    assert contents(run) == contents(tmp_path / "whole")


def test_without_held_out_samples_it_is_said_that_there_is_no_validation_loss(recipe, mmdit, tmp_path):
    done = mmdit("train", recipe("run", data={"validation_share": 0}))
    assert (done.returncode, "no sample is held out: val_loss is null" in done.stderr) == (0, True)
    assert validations(tmp_path / "run") == [(4, None), (8, None)]


def test_what_kills_left_half_published_goes(recipe, mmdit, tmp_path):
    run = tmp_path / "run"
    names = ["config.yaml", "metrics.jsonl", "samples/4.png", "snapshots/4.safetensors", "checkpoints/latest"]
    mine = [temporary_name(run / name) for name in names]
    others = temporary_name(run / "eval.jsonl")
    for path in (*mine, others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert mmdit("train", recipe("run")).returncode == 0
    assert [path for path in (*mine, others) if path.exists()] == [others]


def test_a_configuration_that_cannot_be_written_now_ends_no_resume(recipe, mmdit, tmp_path, monkeypatch):
    """The same one is there already. A new one is tried for a while."""
    config = recipe("run")
    assert mmdit("train", config).returncode == 0
    publish, failures = loop.publish, []

    def full(path: Path) -> Any:
        if path.name == "config.yaml" and len(failures) < 1:
            failures.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(path)

    monkeypatch.setattr(loop, "publish", full)
    done = mmdit("train", config)
    assert (done.returncode, "config.yaml cannot be written" in done.stderr) == (0, False)
    failures.clear()
    done = mmdit("train", recipe("run", log={"every": 2}))
    assert done.returncode == 0
    assert "config.yaml cannot be written" in done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["log"]["every"] == 2
