"""The benchmark of a resume runs, and what it takes does not grow with the number of lines before the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("resume.py")


def test_a_resume_reads_the_end_of_long_files_alone(tmp_path):
    command = [sys.executable, str(COMMAND), "--lines", "100000", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["lines"], found["last"]) == (100_000, 99_000)
    assert found["file_mb"] > 40
    assert found["resume_mb"] < 10
