"""The command line that all benchmarks have."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pairs import HEADER

# Fresh pages cost more than the copies that are measured. malloc reads these when a process starts.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}


class Row(Protocol):
    def json(self) -> str: ...

    def text(self) -> str: ...


class Benchmark(Protocol):
    @property
    def rows(self) -> Mapping[str, object]:
        """By name, in the order of the report."""

    def run(self, name: str) -> Row: ...

    def close(self) -> None: ...


def parser_of(document: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="small sizes and one pair: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows with one of these in their name")
    return parser


def started_with(environment: Mapping[str, str]) -> None:
    """Start this program anew where what is read at a process's start is not as it should be."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))


def report(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    make: Callable[[], Benchmark],
    header: str = HEADER,
) -> None:
    benchmark = make()
    chosen = [name for name in benchmark.rows if not arguments.only or any(part in name for part in arguments.only)]
    if not chosen:
        known = "\n  ".join(benchmark.rows)
        parser.error(f"no row is named like {' or '.join(arguments.only)}; there are\n  {known}")
    if not arguments.json:
        print(header, flush=True)
    try:
        for name in chosen:
            row = benchmark.run(name)
            print(row.json() if arguments.json else row.text(), flush=True)
    finally:
        benchmark.close()
