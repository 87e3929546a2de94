"""How long a checkpoint stops the training, and what resuming at another world size takes, against what others do.

    python tests/benchmarks/checkpoint.py [--json] [--quick] [--only NAME…]

Weights, moments and average of one network on each side, written to the same folder's disk. What is timed of a save is
the call alone; its write ends before the next pass begins.
"""

from __future__ import annotations

from command import MALLOC, parser_of, report, started_with


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    started_with({**MALLOC, "OMP_NUM_THREADS": "2"})
    from checkpoint_rows import Benchmark

    report(parser, arguments, lambda: Benchmark(arguments.quick))


if __name__ == "__main__":
    main()
