"""Damaged files in a run's folder: one line that names the file, and nothing else is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stack.evaluate import watch as service

STEPS = [1, 2, 3]


@pytest.fixture(scope="module")
def evaluated(stage, mmdit) -> Path:
    sections = {"snapshot": {"every": 1}, "schedule": {"steps": 3, "warmup": 1}}
    assert mmdit("train", stage.train_config("damaged", **sections)).returncode == 0
    assert mmdit("evaluate", stage.folder / "damaged", "--watch").returncode == 0
    return stage.folder / "damaged"


@pytest.fixture
def run(evaluated, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(service, "POLL_S", 0.01)
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another value": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "folder": folder,
}


def listed(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["noise", "cut", "another value", "folder"])
def test_a_snapshot(run, mmdit, tmp_path, kind):
    path = run / "snapshots" / "00000003.safetensors"
    DAMAGE[kind](path)
    shutil.rmtree(run / "eval")
    commands = (
        ("sample", run, "a red circle", "-o", tmp_path / "out.png"),
        ("export", run, "-o", tmp_path / "export"),
        ("evaluate", run),
    )
    for command in commands:
        done = mmdit(*command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert str(path) in done.stderr
    done = mmdit("evaluate", run, "--watch")
    assert done.returncode == 1
    assert done.stderr.count("snapshot 3 failed, try") == 3
    assert "could not evaluate the snapshots of steps 3" in done.stderr
    assert listed(run) == [1, 2]


@pytest.mark.parametrize("kind", ["empty", "noise"])
def test_a_result(run, mmdit, kind):
    (path,) = (run / "eval" / "00000002").glob("*.json")
    DAMAGE[kind](path)
    done = mmdit("evaluate", run, "--watch")
    assert done.returncode == 0, done.stderr
    assert f"{path}: damaged" in done.stderr
    assert done.stderr.count('"eval/val_loss":') == 1
    assert listed(run) == STEPS


def test_a_folder_in_the_place_of_a_result(run, mmdit):
    (path,) = (run / "eval" / "00000002").glob("*.json")
    folder(path)
    for command, code in ((("--watch",), 1), (("--step", 2), 2)):
        done = mmdit("evaluate", run, *command)
        assert done.returncode == code
        assert f"{path}: a folder is in the place of a result; remove it" in done.stderr
    assert listed(run) == [1, 3]
    shutil.rmtree(path)
    assert mmdit("evaluate", run, "--watch").returncode == 0
    assert listed(run) == STEPS


@pytest.mark.parametrize("kind", ["cut", "folder"])
def test_the_list_of_results(run, mmdit, kind):
    shutil.rmtree(run / "eval" / "00000002")
    DAMAGE[kind](run / "eval.jsonl")
    for command in (("--watch",), ("--step", 3)):
        done = mmdit("evaluate", run, *command)
        if kind == "folder":
            assert f"{run / 'eval.jsonl'}: cannot be written" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert listed(run) == STEPS


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_lease(run, mmdit, monkeypatch, content):
    """It is nobody's, and is taken over once it is old."""
    import stack.claims

    monkeypatch.setattr(stack.claims, "STALE_S", 0.01)
    monkeypatch.setattr(stack.claims, "HEARTBEAT_S", 0.01)
    (result,) = (run / "eval" / "00000002").glob("*.json")
    shutil.rmtree(result.parent)
    lease = run / "snapshots" / ".claims" / f"00000002.{result.stem}"
    lease.write_bytes(content)
    done = mmdit("evaluate", run, "--watch")
    assert done.returncode == 0, done.stderr
    assert listed(run) == STEPS
