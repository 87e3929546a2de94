"""What a run's lines of metrics and keys cost its next life, which cuts off those after its checkpoint.

Targets: two million lines of metrics in under 1 second and 50 MB beyond what the process has.
python tests/benchmarks/resume.py [--lines 2000000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEHIND = 1000
"""Lines after the checkpoint."""
NAMES = ("samples", "loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3", "lr", "grad_norm", "samples_per_s", "step_s",
         "own_s", "data_wait_s", "checkpoint_stall_s", "tflops_per_s", "rss_gb", "epoch", "skipped")  # fmt: skip


def write(folder: Path, lines: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps({name: 1 / (3 + number) for number, name in enumerate(NAMES)})[1:]
    keys = json.dumps({"keys": [f"{number:09}" for number in range(8)]})[1:]
    for name, rest in (("metrics.jsonl", values), ("keys.jsonl", keys)):
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(f'{{"step": {step}, {rest}\n' for step in range(1, lines + 1))


def begin(folder: Path, lines: int) -> dict[str, float]:
    """Time and memory of a resume until the next line can be written. Runs in a separate process."""
    from stack.log import LogConfig, Metrics

    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    metrics = Metrics(folder, LogConfig(wandb="disabled", keys=True), lines - BEHIND, None, {})
    seconds = time.perf_counter() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    last = metrics.last["step"]
    metrics.close()
    return {"lines": lines, "file_mb": size / 1e6, "last": last, "resume_s": seconds, "resume_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--begin", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
        print(json.dumps(begin(arguments.folder, arguments.lines)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write(Path(folder), arguments.lines)
        command = [sys.executable, __file__, "--begin", "--folder", folder, "--lines", str(arguments.lines)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
