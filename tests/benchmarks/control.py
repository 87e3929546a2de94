"""What sharing a pre-encoding job costs per shard, beside encoding and writing it.

    python tests/benchmarks/control.py [--json] [--quick] [--only NAME…]

The real `Share` and its claims; in place of encoders, an empty tar and its stats are written. Operations are the system
calls of the busiest worker that name a file of the output folder or list it, as strace counts them. Two calls per
encoded shard, which write its outputs, are left out. The time is the slowest worker's, in a run without strace.

python control.py OUT SHARDS      one worker
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from command import parser_of, report
from pairs import Row

ROOT = Path(__file__).resolve().parents[2]
SHARDS = (1_000, 20_000)
WORKERS = 3
MAX_OPERATIONS, MAX_OPERATIONS_FINISHED = 5.0, 2.0
MAX_SLOWDOWN = 1.5  # of a shard among 20,000, against one among 1,000


class Benchmark:
    def __init__(self, quick: bool):
        self._shards = (250, 1_000) if quick else SHARDS
        self._folder = Path(tempfile.mkdtemp(prefix="control-"))

    @cached_property
    def rows(self) -> dict[str, Callable[[str], Row]]:
        rows: dict[str, Callable[[str], Row]] = {}
        for kind, workers in (("one worker", 1), (f"{WORKERS} workers", WORKERS), ("all finished", 1)):
            for number in self._shards:
                rows[f"{kind}, {number:,} shards: operations"] = partial(self._operations, kind, workers, number)
            rows[f"{kind}: time, many shards / few"] = partial(self._times, kind, workers)
        return rows

    def run(self, name: str) -> Row:
        return self.rows[name](name)

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def _operations(self, kind: str, workers: int, number: int, name: str) -> Row:
        most = MAX_OPERATIONS_FINISHED if kind == "all finished" else MAX_OPERATIONS
        if shutil.which("strace") is None:
            return Row(name, None, "no strace", None, most, "per shard", 0)
        out = self._out(kind, number)
        logs = [self._folder / f"strace.{worker}" for worker in range(workers)]
        traced = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=%file,getdents64", "-o"]
        self._run(out, number, [[*traced, str(log)] for log in logs])
        count = max(operations(log.read_text(encoding="utf-8", errors="replace"), out) for log in logs)
        return Row(name, count / number, None, None, most, "per shard", 0)

    def _times(self, kind: str, workers: int, name: str) -> Row:
        """Microseconds per shard."""
        few, many = (self._run(self._out(kind, n), n, [[]] * workers) / n * 1e6 for n in self._shards)
        return Row(name, many, few, many / few, MAX_SLOWDOWN, "µs per shard", 0)

    def _out(self, kind: str, number: int) -> Path:
        out = self._folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        if kind == "all finished":
            self._run(out, number, [[]])
        return out

    def _run(self, out: Path, number: int, wrappers: list[list[str]]) -> float:
        """Seconds of the slowest worker."""
        command = [sys.executable, __file__, str(out), str(number)]
        workers = [subprocess.Popen([*wrapper, *command], stdout=subprocess.PIPE, text=True) for wrapper in wrappers]
        answers = [worker.communicate()[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError("a worker failed")
        found = [json.loads(answer) for answer in answers]
        assert sum(one["encoded"] for one in found) in (0, number)
        return max(one["seconds"] for one in found)


def operations(log: str, out: Path) -> int:
    """Calls in strace's log that name a file of `out` or list it; without those that write outputs."""
    calls = [line for line in log.splitlines() if f'"{out}' in line or ("getdents64(" in line and f"<{out}" in line)]
    return sum(1 for line in calls if not re.search(r"O_TRUNC|resumed>|execve", line))


def work(out: Path, number: int) -> None:
    from stack.preencode.share import Share

    began, encoded = time.perf_counter(), 0
    share = Share(out, [out / f"{shard:06}.tar" for shard in range(number)], {"dtype": "bfloat16"}, "0" * 64)
    if share.left:
        with share.working():
            for shard in share.turns():
                stats = {"mark": share.mark, "samples": 1, "sha256": "0" * 64, "positions": 16, "buckets": [1, 0]}
                stats |= {"sum": [0.0] * 16, "squares": [1.0] * 16, "rejected": []}
                assert share.may_publish(shard)
                share.targets[shard].open("wb").close()
                (out / f"{shard:06}_stats.json").write_text(json.dumps(stats), encoding="utf-8")
                share.done(shard, stats)
                encoded += 1
        share.clean()
    print(json.dumps({"seconds": time.perf_counter() - began, "encoded": encoded}))


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    report(parser, arguments, lambda: Benchmark(arguments.quick))


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        work(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
