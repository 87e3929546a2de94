"""An error of the file system that may pass ends a command with exit code 1, which the job scripts retry."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from collections.abc import Callable
from pathlib import Path

import pytest

import stack.train.loop
from stack.config import UserError, is_users, refusal
from stack.files import lock


@pytest.fixture
def fail_once(monkeypatch) -> Callable[[str, int], list[int]]:
    """Make the next `open` for reading of a file whose path ends in `end` fail; a list that is empty once it has."""

    def install(end: str, number: int) -> list[int]:
        left, real = [number], io.open

        def flaky(path: object, *arguments: object, **options: object) -> object:
            mode = arguments[0] if arguments else options.get("mode", "r")
            if isinstance(path, str | Path) and str(path).endswith(end) and str(mode).startswith("r") and left:
                raise OSError(left.pop(), os.strerror(number), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr("builtins.open", flaky)
        monkeypatch.setattr(io, "open", flaky)
        monkeypatch.setattr(pathlib.io, "open", flaky)  # type: ignore[attr-defined]
        return left

    return install


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    "end",
    [
        "passing.yaml",
        "encoded/manifest.json",
        "encoded/00000.tar",
        "codec/config.json",
        "codec/diffusion_pytorch_model.safetensors",
        "t5/tokenizer.json",
        "t5/model.safetensors",
        "clip_g/open_clip_model.safetensors",
    ],
)
def test_a_training_is_to_be_started_again(mmdit, stage, tmp_path, fail_once, end, number):
    config = stage.train_config("passing", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    left = fail_once(end, number)
    done = mmdit("train", config)
    assert not left
    assert done.returncode == 1, done.stderr
    assert os.strerror(number) in done.stderr


def test_a_snapshot_is_to_be_read_again(mmdit, stage, tmp_path, fail_once):
    config = stage.train_config("passing-read", schedule={"steps": 1})
    assert mmdit("train", config).returncode == 0
    for end in ("00000001.safetensors", "config.yaml"):
        left = fail_once(end, errno.ESTALE)
        command = ("evaluate",) if end == "config.yaml" else ("sample",)
        done = mmdit(*command, stage.folder / "passing-read", *(["a star"] if command == ("sample",) else []))
        assert not left
        assert done.returncode == 1, done.stderr


def test_a_folder_of_shards_that_is_away(mmdit, stage, tmp_path, monkeypatch):
    real = os.stat

    def away(path: object, *arguments: object, **options: object) -> os.stat_result:
        if str(path) == str(stage.shards):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", away)
    for source in (stage.shards, f"{stage.shards}/*.tar", f"{stage.shards}/0000[01].tar"):
        assert mmdit("data", "info", source).returncode == 1


def test_what_a_library_raises_over_a_passing_error_is_that_error():
    def load(number: int) -> Exception:
        try:
            try:
                raise OSError(number, os.strerror(number), "weights")
            except OSError:
                raise OSError("Can't load the model; is it a folder with a file named config.json?")  # noqa: B904
        except OSError as error:
            return refusal(error, "text.t5 cannot be loaded")

    assert load(errno.EIO).errno == errno.EIO  # type: ignore[attr-defined]
    assert isinstance(load(errno.ENOENT), UserError)
    assert isinstance(refusal(ValueError("not a file of weights"), "no weights"), UserError)
    assert not is_users(OSError(errno.ENOSPC, "full"))


def test_the_lock_of_an_earlier_life_is_waited_for(mmdit, stage, tmp_path, monkeypatch):
    config = stage.train_config("waits", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    monkeypatch.setattr(stack.train.loop, "is_remainder", lambda path: True)
    monkeypatch.setattr(stack.train.loop, "LOCK_WAIT_S", 1.5)
    with lock(tmp_path / "run" / ".lock"):
        done = mmdit("train", config)
    assert done.returncode == 1
    assert done.stderr.count("waiting until an earlier life") == 1
    assert "still holds" in done.stderr
    assert mmdit("train", config).returncode == 0
