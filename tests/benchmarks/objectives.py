"""Every path with every prediction, trained alike on scikit-learn's digits; pairs, guidance, solvers: what comes out.

    python tests/benchmarks/objectives.py [--json] [--quick] [--only NAME…]

A DiT of 681,744 parameters learns 8×8 digits from labels: the same weights at the start, batches, noise and steps in
each row, on one thread. Columns: the solver, its network evaluations a sample; the loss, one measure for all rows: mean
square error of rectified flow's velocity at eight ratios of noise to data; the energy distance in pixels between
samples and held-out digits; how often a support vector machine sees in a sample the label that it was drawn for; the
seconds of training. Coarse digits are second images of 4×4 pixels, from which a flow leads to the digits. Rows are
independent, so `--only` divides them among processes.
"""

from __future__ import annotations

from command import parser_of, report, started_with


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    started_with({"OMP_NUM_THREADS": "1"})
    from objectives_rows import HEADER, Benchmark

    report(parser, arguments, lambda: Benchmark(arguments.quick), HEADER)


if __name__ == "__main__":
    main()
