"""The whole demo in small, on somebody's shards, and what running it again does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import Demo
from stack.config import UserError

ROOT = Path(__file__).parents[2]


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WANDB_SILENT": "true"})


def test_the_demo_runs_through_and_skips_what_is_finished(stage, tmp_path):
    arguments = ("--shards", stage.shards, "--out", tmp_path / "demo", "--minutes", 1)
    done = demo(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert {"accuracy_seen", "accuracy_heldout", "peak_rss_gb", "model_parameters"} <= summary.keys()
    assert summary["val_loss_first"] > 0
    assert (summary["ranks"], summary["zero_stage"]) == (2, 2)
    stages = ["autoencoder", "codec", "encoders", "preencode", "train", "sample", "evaluate", "export"]
    assert list(summary["seconds"]) == [*stages, "total"]
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 3
    assert report.count("<svg") == 2
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "mmdit").rglob("*") if path.is_file()}
    again = demo(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before, skipped") == len(stages)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stage_that_was_stopped_keeps_its_time_and_goes_on(stage, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    arguments = ["data", "index", str(shards)]
    with pytest.raises(SystemExit) as stopped:
        Demo(tmp_path).stage("index", arguments, tmp_path / "index")
    assert stopped.value.code == 2
    before = json.loads((tmp_path / "stages.json").read_text())["index"]
    assert not before["finished"]
    assert before["seconds"] > 0
    for path in stage.shards.glob("*"):
        shutil.copy(path, shards)
    Demo(tmp_path).stage("index", arguments, tmp_path / "index")
    after = json.loads((tmp_path / "stages.json").read_text())["index"]
    assert after["finished"]
    assert after["seconds"] > before["seconds"]
    capsys.readouterr()
    Demo(tmp_path).stage("index", arguments, tmp_path / "index")
    assert "index: finished before, skipped" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"draw": 1}', b'{"draw": {', b"[" * 100_000])
def test_a_damaged_record_of_stages_is_named(tmp_path, content):
    (tmp_path / "stages.json").write_bytes(content)
    with pytest.raises(UserError, match=r"stages\.json: damaged; remove it"):
        Demo(tmp_path)


def test_a_number_is_measured_again_for_another_configuration(tmp_path):
    numbers = iter((5, 7, 9))
    for content, expected in (("a", 5), ("a", 5), ("b", 7), ("b", 7), ("a", 9)):
        assert Demo(tmp_path).value("steps", content, lambda: next(numbers)) == expected
