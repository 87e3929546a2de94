"""The objectives' benchmark runs, and training shows in what it measures. How well each learns is no test's matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("objectives.py")
KEYS = {"name", "timesteps", "weight", "solver", "evaluations", "loss", "energy", "accuracy", "seconds"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(COMMAND), *arguments], capture_output=True, text=True)


def test_rows_are_json_and_training_brings_samples_nearer_to_the_digits():
    done = run(
        "--json", "--quick", "--only", "training digits", "untrained", "linear / velocity", "edm / edm", "coarse"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows] == [KEYS] * 6
    digits, untrained, *trained, coarse, refined = rows
    assert [row["evaluations"] for row in trained] == [24, 25]  # noise is left at the end of EDM's path
    assert refined["energy"] < coarse["energy"] / 3
    for row in trained:
        assert digits["energy"] < row["energy"] < untrained["energy"] / 3
        assert row["loss"] < 0.8 * untrained["loss"]


def test_an_unknown_row_is_refused_with_the_known_ones():
    done = run("--only", "nothing of this name")
    assert done.returncode == 2
    assert "sub_vp / score" in done.stderr
    assert "Traceback" not in done.stderr
