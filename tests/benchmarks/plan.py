"""What it costs to begin in the middle of a data set of 100 million pre-encoded samples in 10,000 shards.

Targets: under 3 seconds and 500 MB from a cold process to the first batch of a step in the middle. rare_batch_s is
beside it where that batch is of a bucket that one in 80,000 samples has.
The indices are those of a few drawn shards, hard-linked under 10,000 names beside sparse tars.
python tests/benchmarks/plan.py [--shards 10000] [--samples 10000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
        data = _serialize({**facts, "damage": "", "rejected": []}, groups, measured)
        (folder / f"{kind:05}{SUFFIX}").write_bytes(data)
    for number in range(KINDS, shards):
        for ending in (".tar", SUFFIX):
            os.link(folder / f"{number % KINDS:05}{ending}", folder / f"{number:05}{ending}")


def begin(folder: Path) -> dict[str, float]:
    """In a process of its own: from nothing to the first batch in the middle of the third epoch."""
    import torch  # noqa: F401 (its import is not what is measured)

    from stack.data.plan import BatchPlan
    from stack.data.samples import TrainingSamples
    from stack.data.shards import ShardSet, index_shards

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
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
    ended = time.perf_counter()
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
        "ms_a_batch_after": (after - ended) * 10,
        "rare_batch_s": gathered - found,
        "mb_more": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
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
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--begin", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        print(json.dumps(begin(arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not any(folder.glob("*.tar")):
            write(folder, arguments.shards, arguments.samples)
        for _ in range(2):
            subprocess.run([sys.executable, __file__, "--begin", "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
