"""What it costs to begin in the middle of a data set of 100 million pre-encoded samples in 10,000 shards.

Targets: under 3 seconds of processor and 500 MB from a cold process to the first batch of a step in the middle, for
100 million samples in 10,000 shards and for a billion in 100,000; 2 seconds for 20,000 shards. rare_batch_s is beside
it where that batch is of a bucket that one in 80,000 samples has. opens and stats count the calls for shards, indices
and the table until the first batch. --delay: milliseconds that each stat and open takes longer, as on a network.
The indices are those of a few drawn shards, hard-linked under 10,000 names beside sparse tars, with the table that
`mmdit data index` writes.
python tests/benchmarks/plan.py [--shards 10000] [--samples 10000] [--delay 0] [--folder DIR]
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stack.data.plan import BatchPlan

KINDS = 16  # different shards
SIDES = ((32, 32), (40, 24), (24, 40), (48, 20), (20, 48), (28, 36), (36, 28), (16, 64))


def write(folder: Path, shards: int, samples: int) -> None:
    """Indices as `build_index` writes them, of samples that do not exist."""
    from stack.data.index import SUFFIX, _serialize
    from stack.data.tar import Member

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in range(KINDS):
        tar = folder / f"{kind:05}.tar"
        with tar.open("wb") as file:
            file.truncate(samples * 200_000)
        os.utime(tar, ns=(10**18, 10**18))
        sides, lengths = (
            rng.choice(len(SIDES) - 1, samples, p=[0.6, 0.2, 0.1, 0.05, 0.04, 0.009, 0.001]),
            rng.integers(5, 78, samples),
        )
        if kind % 8 == 0:
            sides[samples // 2] = len(SIDES) - 1
        keys = [f"{kind:05}{row:07}" for row in range(samples)]
        groups = {key: {"safetensors": Member("", row * 204_800, 200_000, "file")} for row, key in enumerate(keys)}
        facts = {"sha256": "", "size": samples * 200_000, "version": str(10**18), "digest": str(kind)}
        measured = {key: (*SIDES[side], [int(length)]) for key, side, length in zip(keys, sides, lengths, strict=True)}
        facts |= {"damage": "", "rejected": [], "bad_captions": [], "pixels": [0, None]}
        data = _serialize({**facts, "num_strays": 0, "strays": [], "further": []}, groups, measured)
        (folder / f"{kind:05}{SUFFIX}").write_bytes(data)
    for number in range(KINDS, shards):
        for ending in (".tar", SUFFIX):
            os.link(folder / f"{number % KINDS:05}{ending}", folder / f"{number:05}{ending}")
    index = "import sys; from stack.data.shards import index_shards; index_shards(sys.argv[1])"
    subprocess.run([sys.executable, "-c", index, str(folder)], check=True)


def count_calls(folder: Path, delay_ms: float) -> dict[str, int]:
    """Counts, from here on, the calls for files in `folder`, and makes each slower."""
    counts = {"opens": 0, "stats": 0}

    def counted(call: Any, name: str) -> Any:
        def counting(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).startswith(str(folder)):
                counts[name] += 1
                if delay_ms:  # sleep(0) waits, too
                    time.sleep(delay_ms / 1e3)
            return call(path, *arguments, **options)

        return counting

    io.open = builtins.open = counted(io.open, "opens")
    os.stat, os.lstat = counted(os.stat, "stats"), counted(os.lstat, "stats")
    return counts


def begin(folder: Path, delay_ms: float) -> dict[str, float]:
    """In a process of its own: from nothing to the first batch in the middle of the third epoch."""
    import torch  # noqa: F401 (its import is not what is measured)

    from stack.data.plan import BatchPlan
    from stack.data.samples import TrainingSamples
    from stack.data.shards import ShardSet, index_shards

    counts = count_calls(folder, delay_ms)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    processor = time.process_time()
    samples = ShardSet(index_shards(folder))
    indexed = time.perf_counter()
    ids, width, height = samples.held_out(512, int(0.03 * 2**32))
    hashed = time.perf_counter()
    codes = np.array([(width << 32) + height for width, height in SIDES])
    order = np.argsort(codes)

    def bucket_of(width: np.ndarray, height: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(codes, (width.astype(np.int64) << 32) + height, sorter=order)]

    held_out = ids, bucket_of(width, height)
    table = TrainingSamples(samples, range(len(samples.indices)), bucket_of, len(SIDES), held_out, None, [1.0])
    counted = time.perf_counter()
    plan = BatchPlan([table], 2048, seed=0)
    middle = int(2.5 * samples.num_samples / 2048)
    first = plan.batch(middle)
    ended, processor, calls = time.perf_counter(), time.process_time() - processor, dict(counts)
    mb_more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    for n in range(middle + 1, middle + 101):
        plan.batch(n)
    after = time.perf_counter()
    rare = step_of_rare(plan, plan.window_of(middle))
    plan, found = BatchPlan([table], 2048, seed=0), time.perf_counter()
    plan.batch(rare)
    gathered = time.perf_counter()
    return {
        "samples": samples.num_samples,
        "index_s": indexed - began,
        "validation_s": hashed - indexed,
        "counts_s": counted - hashed,
        "first_batch_s": ended - counted,
        "total_s": ended - began,
        "processor_s": processor,
        **calls,
        "ms_a_batch_after": (after - ended) * 10,
        "rare_batch_s": gathered - found,
        "mb_more": mb_more,
        "checksum": int(first.id.sum()),
    }


def step_of_rare(plan: BatchPlan, window: int) -> int:
    """The next step, of this window or a later one, whose batch is of the last bucket."""
    while plan._pieces(window + 1)[-1] == plan._pieces(window)[-1]:
        window += 1
    buckets = [bucket for bucket, _ in plan._batches(window)]
    return int(plan._pieces(window).sum()) + buckets.index(len(SIDES) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--begin", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        print(json.dumps(begin(arguments.folder, arguments.delay)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not any(folder.glob("*.tar")):
            write(folder, arguments.shards, arguments.samples)
        options = ["--folder", str(folder), "--delay", str(arguments.delay)]
        for _ in range(2):
            subprocess.run([sys.executable, __file__, "--begin", *options], check=True)


if __name__ == "__main__":
    main()
