"""How long a checkpoint stops the training, and what resuming at another world size takes, against what others do.

    python tests/benchmarks/checkpoint.py [--json] [--quick] [--only NAME…]

Weights, moments and average of one network on each side, written to the same folder's disk. A save costs what it adds
to a forward and backward pass that comes after it; its write ends before the next pass begins. malloc is as it comes:
a copy into new memory pays for it.
"""

from __future__ import annotations

from command import parser_of, report, started_with


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    started_with({"OMP_NUM_THREADS": "2"})
    from checkpoint_rows import Benchmark

    report(parser, arguments, lambda: Benchmark(arguments.quick))


if __name__ == "__main__":
    main()
