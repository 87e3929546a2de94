"""Every stage by its command, on a small data set."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image


def test_train_sample_evaluate_export(mmdit, stage, tmp_path):
    config = stage.train_config("run", schedule={"steps": 4, "warmup": 1})
    assert mmdit("train", config, "--ranks", 2, "parallel.engine=zero", "parallel.zero_stage=2").returncode == 0
    run = stage.folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert (run / "samples" / "00000004.png").exists()

    assert mmdit("sample", run, "a red circle", "--steps", 2, "-o", tmp_path / "one.png").returncode == 0
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == (32, 32, 3)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    grid = ("sample", run, "--prompts", tmp_path / "prompts.txt", "--steps", 2, "-o", tmp_path / "grid.png")
    assert mmdit(*grid).returncode == 0
    assert Image.open(tmp_path / "grid.png").width > 200

    result = json.loads(mmdit("evaluate", run, "--scenes", 4, "--steps", 2).stdout)
    assert abs(result["val_loss"] - lines[-1]["val_loss"]) < 1e-5
    assert result["seen_1"]["num"] == 4

    assert mmdit("export", run, "-o", tmp_path / "export").returncode == 0
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"config.json", "model.safetensors"}
