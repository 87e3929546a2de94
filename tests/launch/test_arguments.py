"""Arguments of the command line: paths as in a configuration file, output in any encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTPUTS = [
    ("data", "synth", "{}"),
    ("data", "digits", "{}"),
    ("data", "encoders", "{}"),
    ("data", "preview", "shards", "-o", "{}"),
    ("data", "index", "shards", "--index", "{}"),
    ("data", "lint", "shards", "--cache", "{}"),
    ("sample", "run", "a prompt", "-o", "{}"),
    ("export", "run", "-o", "{}"),
    ("sweep", "run", "x.yaml", "--dir", "{}"),
    ("demo", "--out", "{}"),
]


@pytest.mark.parametrize("command", OUTPUTS, ids=" ".join)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://user:secret@host/x?token=secret", "a URL, expected a path"),
        ("s3:/user:secret@bucket/x", "a URL, expected a path"),
        ("$NOWHERE/x", "'$' is not expanded"),
        ("~nobody-of-this-name/x", "no such user"),
        ("", "expected a path"),
    ],
)
def test_an_output_that_is_no_path_is_refused(mmdit, tmp_path, monkeypatch, command, text, says):
    monkeypatch.chdir(tmp_path)
    done = mmdit(*(word.format(text) for word in command))
    assert done.returncode == 2
    assert says in done.stderr
    assert "secret" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(mmdit, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(stage.shards)
    assert mmdit("data", "info", "~/shards").returncode == 0
    assert mmdit("data", "preview", "~/shards", "--resolution", 32, "-o", "~/page.html").returncode == 0
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "command", [("data", "encoders", "x"), ("data", "preview", "x", "-o", "y"), ("sample", "x", "y")]
)
def test_a_seed_has_64_bits(mmdit, command):
    for seed in (2**64, -1):
        done = mmdit(*command, "--seed", seed)
        assert (done.returncode, "0<=x<=18446744073709551615" in done.stderr) == (2, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_locale_cannot_write_is_escaped(tmp_path, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    for command in (("--help",), ("train", "--help"), ("data", "synth", "größe→", "num_samples=4")):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *command], cwd=tmp_path, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert b": 4 scenes" in done.stdout
    assert (tmp_path / "größe→").is_dir()
