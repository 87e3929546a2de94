"""The plan's benchmark runs. Its figures are no test's matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("plan.py")


def test_both_processes_begin_with_the_same_samples(tmp_path):
    sizes = ("--shards", "20", "--samples", "50", "--folder", str(tmp_path))
    done = subprocess.run([sys.executable, str(COMMAND), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["samples"] == 20 * 50
    assert first["checksum"] == second["checksum"]
    assert {key for key in first if key.endswith("_s")} == {
        *("index_s", "validation_s", "counts_s", "first_batch_s", "total_s", "processor_s", "rare_batch_s")
    }
    assert 0 < first["opens"] <= 2 * 20
    assert 20 <= first["stats"] <= 2 * 20
