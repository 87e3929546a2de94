"""The likelihood's benchmark runs. Which model says less is no test's matter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


def test_rows_are_json():
    command = [sys.executable, str(Path(__file__).with_name("likelihood.py")), "--json", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    exact, estimated, normal, even, agreement, *below = rows
    assert (exact, estimated, normal, even) == (
        "exact trace", "Rademacher, 4 probes", "normal distribution", "even chances"
    )  # fmt: skip
    assert rows[exact]["trace_error"] == 0
    assert rows[even]["value"] == math.log2(17)
    assert 1 < rows[normal]["value"] < math.log2(17)
    apart = (rows[estimated]["value"] - rows[exact]["value"]) / rows[estimated]["trace_error"]
    assert (rows[agreement]["value"], rows[agreement]["target"]) == (pytest.approx(apart), "|·| < 2")
    for name, other in zip(below, (normal, even), strict=True):
        assert rows[name]["value"] == pytest.approx(rows[exact]["value"] - rows[other]["value"])
