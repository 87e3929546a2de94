"""Our loaders and text pre-encoding against what a user would take instead, side by side in one run.

    python tests/benchmarks/data.py [--json] [--quick] [--only NAME…]

Each row is measured ours, peer, ours, peer, … after one pass each to warm up: the same samples in a warm page cache,
the same tensors copied into batches of 32, in one process without workers, one thread for torch, malloc told on both
sides to keep its memory. Peers that need other versions than ours get an environment in tests/benchmarks/.venv-peers
the first time; a row whose peer cannot be installed says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from command import MALLOC, parser_of, report, started_with

ENVIRONMENT = {**MALLOC, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    parser = parser_of(__doc__)
    folder = Path(__file__).with_name(".venv-peers")
    parser.add_argument("--peers", type=Path, default=folder, help="folder for the peers' environments")
    parser.add_argument("--work", type=Path, help="folder for 2 GB of data; a temporary one if not given")
    arguments = parser.parse_args()
    started_with(ENVIRONMENT)
    import torch
    from data_rows import Benchmark

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        report(parser, arguments, lambda: Benchmark(Path(work), arguments.peers, arguments.quick))


if __name__ == "__main__":
    main()
