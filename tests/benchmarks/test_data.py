"""The loaders' benchmark runs and leaves no row out. Its figures are no test's matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("data.py")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Without an index to install from."""
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_NO_INDEX": "1"},
    )


def test_rows_are_json_and_a_missing_peer_is_named(tmp_path):
    names = ["samples of 0.2 MB / webdataset", "samples of 0.2 MB / litdata", "bytes, captions of 35 tokens, bfloat16"]
    done = run("--json", "--quick", "--peers", tmp_path, "--work", tmp_path, "--only", *names)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows] == [{"name", "ours", "peer", "ratio", "target", "unit", "pairs"}] * 5
    *measured, absent, counted = rows
    for row in measured:
        assert row["ratio"] > 0
        assert row["pairs"] == 1
    assert (absent["peer"], absent["ratio"]) == ("not installed", None)
    assert counted["ratio"] > 6
    assert list(tmp_path.iterdir()) == [tmp_path / "litdata"]


def test_float8_loses_less_than_its_step(tmp_path):
    """e4m3 rounds to one part in 16."""
    done = run("--json", "--quick", "--work", tmp_path, "--only", "relative error")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["peer"] == "no data" or 0.01 < row["ours"] < 1 / 16


def test_an_unknown_row_is_refused_with_the_known_ones():
    done = run("--only", "nothing of this name")
    assert done.returncode == 2
    assert "share of a plain read" in done.stderr
    assert "Traceback" not in done.stderr
