from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("checkpoint.py")


def test_rows_are_json():
    done = subprocess.run([sys.executable, str(COMMAND), "--json", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows] == [{"name", "ours", "peer", "ratio", "target", "unit", "pairs"}] * 4
    assert all(row["ratio"] > 0 for row in rows)
