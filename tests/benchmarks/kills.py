"""Pre-encoding, killed at random moments, ends with the same bytes as an undisturbed run.

Two workers share one folder; SIGKILL hits one of them or both, over and over, and they are started again.
python tests/benchmarks/kills.py CONFIG [--kills 20] [OVERRIDES …]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """All that counts: an index also says when its shard was written."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and ".index." not in p.name}


def start(config: str, overrides: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.cli", "preencode", config, *overrides, f"out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary, "whole"), Path(temporary, "killed")
        began = time.monotonic()
        process = start(arguments.config, arguments.overrides, whole)
        error = process.communicate()[1].decode()
        assert process.returncode == 0, error
        undisturbed = time.monotonic() - began
        print(f"undisturbed: {undisturbed:.1f} s, {len(contents(whole))} files", flush=True)

        kills, moments = 0, []
        workers = [start(arguments.config, arguments.overrides, killed) for _ in range(2)]
        while kills < arguments.kills:
            time.sleep(rng.uniform(0.2, 1.0) * max(4.0, undisturbed / 3))
            finished = len(list(killed.glob("*_stats.json"))) if killed.exists() else 0
            for number in rng.choice([(0,), (1,), (0, 1)]):
                workers[number].send_signal(signal.SIGKILL)
                workers[number].communicate()
                kills += 1
                moments.append(finished)
                workers[number] = start(arguments.config, arguments.overrides, killed)
        for worker in workers:
            error = worker.communicate()[1].decode()
            assert worker.returncode == 0, error
        same = contents(whole) == contents(killed)
        print(f"{kills} kills, at {moments} finished shards; the same bytes: {same}")
        leftovers = [p.name for p in killed.glob(".*.tmp")]
        print(f"left behind: {leftovers or 'nothing'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
