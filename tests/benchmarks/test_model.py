"""The model's benchmark runs, and compares what is equal. Its figures are no test's matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("model.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(COMMAND), *arguments], capture_output=True, text=True)


def test_rows_are_json():
    done = run("--json", "--quick", "--only", "step, ", "attention", "sampling", "EMA", "recomputed")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows] == [{"name", "ours", "peer", "ratio", "target", "unit", "pairs"}] * 11
    assert all(row["ratio"] > 0 for row in rows)


def test_an_unknown_row_is_refused_with_the_known_ones():
    done = run("--only", "nothing of this name")
    assert done.returncode == 2
    assert "step, SD3" in done.stderr
    assert "Traceback" not in done.stderr
