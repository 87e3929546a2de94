"""The likelihood's benchmark runs. Which model says less is no test's matter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path


def test_rows_are_json():
    command = [sys.executable, str(Path(__file__).with_name("likelihood.py")), "--json", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == ["exact trace", "Rademacher, 4 probes", "normal distribution", "even chances"]
    assert rows["exact trace"]["trace_error"] == 0
    assert rows["even chances"]["bits_per_dim"] == math.log2(17)
    assert 1 < rows["normal distribution"]["bits_per_dim"] < math.log2(17)
