"""Prompts of a run: a bad one ends the command before anything is loaded, a long one is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ODD = [
    "it’s a red star &amp; more",
    "",
    "\u200b",
    "a\0b\x1b[31m",
    "\ufeffa star",
    "👩‍👩‍👧 cafe\u0301 \u202e",
    "a <|endoftext|> b",
    "A\nB",
]
LONG = "very " * 100 + "long"


def refused(done, *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(text in done.stderr.strip().splitlines()[-1] for text in says), done.stderr


@pytest.fixture(scope="module")
def trained(stage, mmdit) -> tuple[Path, str]:
    """(run folder, standard error) of a training whose previews have odd prompts and a long one."""
    preview = {"prompts": [*ODD, LONG], "steps": 2}
    config = stage.train_config(
        "odd_prompts", objective={**_objective(stage), "preview": preview}, snapshot={"every": 2}
    )
    done = mmdit("train", config)
    assert done.returncode == 0, done.stderr
    assert (stage.odd_prompts / "samples" / "00000004.png").exists()
    return stage.odd_prompts, done.stderr


def _objective(stage) -> dict:
    import yaml

    return yaml.safe_load(stage.train_config("unused").read_text())["objective"]


def test_prompts_of_previews_are_encoded_before_the_first_step(trained, stage, mmdit):
    error = trained[1]
    named = f"prompt {len(ODD) + 1} was cut: clip_l reads the first 77 of its 103 tokens: {LONG[:60] + '…'!r}"
    assert error.count("was cut") == 3  # one line per encoder
    assert error.index(named) < error.index("odd_prompts 4/4")
    assert named in mmdit("train", stage.folder / "odd_prompts.yaml", "--dry-run").stderr


def test_a_bad_prompt_is_refused_before_a_training_begins(stage, mmdit):
    long = "objective.preview.prompts: prompt 2 has 70,000 bytes"
    for prompt, reason in (("a \ud800", "cannot be read as YAML"), ("x" * 70_000, long)):
        preview = {"prompts": ["a star", prompt], "steps": 2}
        config = stage.train_config("bad_prompt", objective={**_objective(stage), "preview": preview})
        refused(mmdit("train", config), reason)
        assert not stage.bad_prompt.exists()


def test_a_bad_prompt_is_refused_before_a_run_is_read(mmdit, tmp_path):
    refused(mmdit("sample", tmp_path / "no_run", "a \udcff"), "prompt 1 is not UTF-8: U+DCFF")
    refused(mmdit("sample", tmp_path / "no_run", "x" * 70_000), "prompt 1 has 70,000 bytes")
    for name, data in (("latin.txt", b"caf\xe9"), ("half.txt", "\ufeff\ud800".encode("utf-16", "surrogatepass"))):
        (tmp_path / name).write_bytes(data)
        refused(mmdit("sample", tmp_path / "no_run", "--prompts", tmp_path / name), f"{name}: not a text in UTF-8")
    (tmp_path / "empty.txt").write_text("\ufeff\n \n\u200b\n", encoding="utf-8")
    refused(mmdit("sample", tmp_path / "no_run", "--prompts", tmp_path / "empty.txt"), "empty.txt: holds no prompt")
    (tmp_path / "long.txt").write_text("a star\n" + "x" * 70_000, encoding="utf-8")
    refused(mmdit("sample", tmp_path / "no_run", "--prompts", tmp_path / "long.txt"), "long.txt: prompt 2 has 70,000")


def test_prompts_that_read_alike_are_drawn_alike(trained, mmdit, tmp_path):
    run, images = trained[0], {}
    for number, prompt in enumerate(["it's a star", "it’s a star", "\ufeffit&rsquo;s a\0 star ", "", "\u200b"]):
        done = mmdit("sample", run, prompt, "--steps", 2, "-o", tmp_path / f"{number}.png")
        assert done.returncode == 0, done.stderr
        images[number] = np.asarray(Image.open(tmp_path / f"{number}.png"))
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    assert np.array_equal(images[3], images[4])
    assert not np.array_equal(images[0], images[3])


def test_a_file_of_prompts_in_any_unicode_form(trained, mmdit, tmp_path):
    lines = ["a star", "it’s\u2028one\x0bprompt", "", "\u200b", LONG]
    sheets = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "prompts.txt").write_bytes("\r\n".join(lines).encode(encoding))
        done = mmdit(
            "sample", trained[0], "--prompts", tmp_path / "prompts.txt", "--steps", 2, "-o", tmp_path / "x.png"
        )
        assert done.returncode == 0, done.stderr
        assert "3 images" in done.stdout
        assert "prompt 3 was cut: clip_g reads the first 77 of its 103 tokens" in done.stderr
        sheets.append((tmp_path / "x.png").read_bytes())
    assert sheets[0] == sheets[1] == sheets[2]


def test_the_checkpoint_of_such_a_run_is_resumed(trained, stage, mmdit):
    config = stage.folder / "odd_prompts.yaml"
    done = mmdit("train", config)
    assert done.returncode == 0, done.stderr
    assert json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
