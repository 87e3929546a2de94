"""NNNNN_stats.json: what is known of a finished shard, which is finished only if this file is whole."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stack.config import UserError, is_users
from stack.data.cuts import Cut

_THREADS = 16  # a network file system answers each after a millisecond
_BLOCK = 16  # files that a thread reads in one go


class Finished(NamedTuple):
    """What the manifest needs of a finished shard.

    samples: that are stored.  sha256: of the tar.  positions, sum, squares: of the latent, over all samples; the sums
    float64 [channels], without channels if there is no sample.  buckets: samples per bucket, int64.  rejected: kind of
    reason → samples that were left out.  cut: encoder → captions of which it read only the beginning.
    """

    samples: int
    sha256: str
    positions: int
    sum: np.ndarray
    squares: np.ndarray
    buckets: np.ndarray
    rejected: Counter[str]
    cut: dict[str, Cut]


def stats_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def read_stats(path: Path) -> dict[str, Any] | None:
    """None if there is no such file, or one that a broken disk left: its shard is done again."""
    try:
        stats = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_users(error):
            problem = f"cannot be read ({error.strerror}): mend its permissions, or remove it to encode its shard again"
            raise UserError(f"{path}: {problem}") from None
        raise
    except (ValueError, RecursionError):
        return None
    return stats if isinstance(stats, dict) else None


def read_all(paths: Sequence[Path]) -> Iterator[dict[str, Any] | None]:
    """`read_stats` of many, by several threads, in order; a bounded number of them is read ahead."""

    def read(start: int) -> list[dict[str, Any] | None]:
        return [read_stats(path) for path in paths[start : start + _BLOCK]]

    starts = iter(range(0, len(paths), _BLOCK))
    with ThreadPoolExecutor(_THREADS) as threads:
        pending = deque(threads.submit(read, start) for start in islice(starts, 2 * _THREADS))
        while pending:
            yield from pending.popleft().result()
            pending.extend(threads.submit(read, start) for start in islice(starts, 1))


def finished(stats: dict[str, Any]) -> Finished | None:
    """None where a value is missing or not of its kind, as in a damaged file."""
    try:
        rejected = Counter(_text(entry["reason"]).partition(":")[0] for entry in stats["rejected"])
        found = Finished(
            samples=_count(stats["samples"]),
            sha256=_text(stats["sha256"]),
            positions=_count(stats["positions"]),
            sum=np.array(stats["sum"], np.float64),
            squares=np.array(stats["squares"], np.float64),
            buckets=np.array([_count(count) for count in stats["buckets"]], np.int64),
            rejected=rejected,
            cut={name: Cut(**cut) for name, cut in stats.get("cut", {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    shape = found.sum.shape if found.samples else ()
    whole = found.sum.shape == found.squares.shape == shape and len(shape) == bool(found.samples)
    return found if whole and (found.positions > 0) == (found.samples > 0) == (found.buckets.sum() > 0) else None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value
