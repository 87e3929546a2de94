"""The model's step, sampling, attention and optimizer against what a user would take instead, side by side in one run.

    python tests/benchmarks/model.py [--json] [--quick] [--only NAME…]

Each row is measured ours, peer, ours, peer, … after one pass each to warm up: the same weights and inputs in float32,
two threads, malloc told on both sides to keep its memory. Where both sides can compute the same, it is checked first.
"""

from __future__ import annotations

from command import MALLOC, parser_of, report, started_with

ENVIRONMENT = {**MALLOC, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    started_with(ENVIRONMENT)
    from model_rows import Benchmark

    report(parser, arguments, lambda: Benchmark(arguments.quick))


if __name__ == "__main__":
    main()
