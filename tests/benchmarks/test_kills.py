"""Pre-encoding, killed once, ends with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).with_name("kills.py")


def test_it_runs(stage):
    command = [sys.executable, str(COMMAND), str(stage.folder / "preencode.yaml"), "--kills", "1"]
    done = subprocess.run(command, cwd=COMMAND.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].endswith("the same bytes: True")
    assert done.stdout.splitlines()[-1] == "left behind: nothing"
