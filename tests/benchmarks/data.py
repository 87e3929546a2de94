"""Our loaders and text pre-encoding against what a user would take instead, side by side in one run.

    python tests/benchmarks/data.py [--json] [--quick] [--only NAME…]

Each row is measured ours, peer, ours, peer, … after one pass each to warm up: the same samples in a warm page cache,
the same tensors copied into batches of 32, in one process without workers, one thread for torch, malloc told on both
sides to keep its memory. Peers that need other versions than ours get an environment in tests/benchmarks/.venv-peers
the first time; a row whose peer cannot be installed says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Fresh pages cost more than the copies that are measured. malloc and OpenMP read these when a process starts.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="few samples and one pair: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows with one of these in their name")
    folder = Path(__file__).with_name(".venv-peers")
    parser.add_argument("--peers", type=Path, default=folder, help="folder for the peers' environments")
    parser.add_argument("--work", type=Path, help="folder for 2 GB of data; a temporary one if not given")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
    import torch
    from data_rows import Benchmark
    from pairs import HEADER

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        benchmark = Benchmark(Path(work), arguments.peers, arguments.quick)
        chosen = [name for name in benchmark.rows if not arguments.only or any(part in name for part in arguments.only)]
        if not chosen:
            known = "\n  ".join(benchmark.rows)
            parser.error(f"no row is named like {' or '.join(arguments.only)}; there are\n  {known}")
        if not arguments.json:
            print(HEADER, flush=True)
        try:
            for name in chosen:
                row = benchmark.run(name)
                print(row.json() if arguments.json else row.text(), flush=True)
        finally:
            benchmark.close()


if __name__ == "__main__":
    main()
