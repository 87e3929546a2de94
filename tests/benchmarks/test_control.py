"""The benchmark of pre-encoding's control plane runs, and a shard costs no more operations than its row's target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("control.py")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_shard_costs_a_bounded_number_of_operations():
    command = [sys.executable, str(COMMAND), "--json", "--quick", "--only", "one worker, ", "all finished, "]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows] == [{"name", "ours", "peer", "ratio", "target", "unit", "pairs"}] * 4
    assert all(1 <= row["ours"] <= row["target"] for row in rows)
