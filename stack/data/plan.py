"""The batch plan: which samples stand in global batch n is a pure function of (index, seed, n).

It does not know ranks, workers or restarts. To resume is to go on with the next n; another number of ranks cuts the
same batches in other slices.

**Epochs.** Each data set is an endless sequence of samples: epoch after epoch, its shards permuted anew in each, the
samples of a shard in their order. An epoch of the plan takes Q_d samples of data set d, the next ones of its sequence.
For one data set, and for several without weights, Q_d is its size. With weights w_d, Q_d = w_d·N (Σ w_d = 1, N samples
in all): a set of little weight is then spread over several epochs, one of large weight repeated.

**Windows.** An epoch is cut into K windows of about `window` samples: window k takes the samples ⌊k·Q_d/K⌋ to
⌊(k+1)·Q_d/K⌋ of each data set, which stand in few shards, so reads stay local and no more than a few windows are in
memory. In a window the samples of each bucket are permuted, then sorted by caption length in chunks of some batches.

**Batches.** Bucket b is the endless sequence of its samples, window after window; its batches are consecutive pieces of
batch_size, so leftovers of a window begin the next one's first batch and each sample stands in each epoch exactly once.
Before window g bucket b has yielded ⌊C_b(g)/batch_size⌋ batches, C_b(g) counting its samples in earlier windows; those
that a window adds, of all buckets, are shuffled among each other. C_b follows from the shards' counts, so any window is
found without walking through those before it. A rare bucket's batch is gathered from thousands of windows, of which
those shards alone are read that have samples of it.

Random numbers: a permutation is the order of raw 64-bit words of Philox seeded by SeedSequence([stream, seed, …]);
NumPy keeps both of these streams stable over versions, which it does not promise for Generator.permutation. The caption
of a sample is chosen by splitmix64 of (seed, epoch, sample).
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from stack.config import UserError

_SAMPLES, _BATCHES, _SHARDS = 0, 1, 2  # random streams
_CHUNK_BATCHES = 16  # captions are sorted by length inside chunks of so many batches
_CACHED_WINDOWS = 3
WINDOW = 2**16


class Draw(NamedTuple):
    """One sample of one step. `position` is its index in the global batch, which the noise plan goes by."""

    step: int
    position: int
    sample_id: int
    caption: int


class Samples(NamedTuple):
    """Some samples of the plan, n of them."""

    id: np.ndarray  # int64 [n]
    caption: np.ndarray  # int64 [n]
    epoch: np.ndarray  # int64 [n], of its data set


class Rows(NamedTuple):
    """The samples of one shard, n of them, in their order."""

    id: np.ndarray  # int64 [n], unique over all data sets
    bucket: np.ndarray  # int64 [n]
    caption_length: np.ndarray  # int [n, captions], −1 for a caption that the sample lacks


_Buckets = int | slice
_ALL = slice(None)
_Read = tuple[Samples, np.ndarray, np.ndarray]
"""(samples, buckets, caption lengths)."""


class SampleTable(Protocol):
    """What the plan asks of one data set."""

    counts: np.ndarray
    """Samples by shard and bucket, int64 [shards, buckets]."""
    weight: float | None
    caption_weights: Sequence[float]

    def rows(self, shard: int) -> Rows:
        """All samples of one shard."""


class BatchPlan:
    """Batches of one bucket each, in which captions of like length stand together.

    Args:
        tables: the data sets; all count the same buckets.
        batch_size: samples in a global batch.
        seed: not negative.
        window: about how many samples are permuted among each other.

    Raises UserError for no samples, a batch size below 1, or weights given to some of the data sets only.
    """

    def __init__(self, tables: Sequence[SampleTable], batch_size: int, seed: int, window: int = WINDOW) -> None:
        self._sets = [_Sequence(table, seed, number) for number, table in enumerate(tables)]
        self.num_samples = sum(one.size for one in self._sets)
        if not self._sets or not all(one.size for one in self._sets):
            raise UserError("the data set has no samples: nothing can be planned")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.quotas = _quotas([one.size for one in self._sets], [table.weight for table in tables])
        """Samples that an epoch takes of each data set."""
        self._windows = -(-sum(self.quotas) // window)  # of an epoch
        self._num_buckets = tables[0].counts.shape[1]
        self._cache = _Cache(_CACHED_WINDOWS)
        self._before_cache = _Cache(64)

    def batch(self, n: int) -> Samples:
        """Global batch `n`: batch_size samples of one bucket."""
        window = self.window_of(n)
        first = int(self._pieces(window).sum())
        bucket, piece = self._cache.get(("batches", window), lambda: self._batches(window))[n - first]
        start, stop = piece * self.batch_size, (piece + 1) * self.batch_size
        parts: list[Samples] = []
        near = range(window + 1 - _CACHED_WINDOWS, window + 1)
        while start < stop:  # from the end: the beginning may lie windows back, thousands of them for a rare bucket
            before = int(self._before(window)[bucket] if window in near else self._count_before(window, bucket))
            if before < stop:
                if window in near:
                    order = self._order(window, bucket, before)
                else:
                    order = self._sort(self._read(window, bucket), window, bucket, before)
                parts.append(Samples(*(values[max(0, start - before) : stop - before] for values in order)))
                stop = max(start, before)
            window -= 1
        return Samples(*map(np.concatenate, zip(*reversed(parts), strict=True)))

    def epoch_of(self, n: int) -> int:
        """The epoch, from 0, that yields batch `n`."""
        return self.window_of(n) // self._windows

    def shards_of(self, window: int) -> list[tuple[int, int]]:
        """(data set, shard) of all samples of a window."""
        return [
            (number, shard)
            for number, (one, quota) in enumerate(zip(self._sets, self.quotas, strict=True))
            for shard in one.shards_between(self._position(window, quota), self._position(window + 1, quota))
        ]

    def _position(self, window: int, quota: int) -> int:
        """Where a window begins in a data set's sequence."""
        epoch, k = divmod(window, self._windows)
        return epoch * quota + k * quota // self._windows

    def _before(self, window: int) -> np.ndarray:
        """Samples of each bucket in all windows before this one, int64 [buckets]."""
        return self._before_cache.get(window, lambda: self._count_before(window, _ALL))

    def _count_before(self, window: int, buckets: _Buckets) -> np.ndarray:
        positions = [self._position(window, quota) for quota in self.quotas]
        return sum(one.count_before(at, buckets) for one, at in zip(self._sets, positions, strict=True))  # type: ignore[return-value]

    def _pieces(self, window: int) -> np.ndarray:
        """Batches of each bucket in all windows before this one, int64 [buckets]."""
        return self._before(window) // self.batch_size

    def window_of(self, n: int) -> int:
        """The window that yields batch `n`; never less than that of an earlier batch."""
        assert n >= 0, n
        # A bucket holds back less than one batch, so all of them together less than one each.
        first, last = n * self.batch_size, (n + 1 + self._num_buckets) * self.batch_size
        per_epoch = sum(self.quotas)
        windows = range(first // per_epoch * self._windows, (last // per_epoch + 1) * self._windows)
        return windows.start + bisect.bisect_right(windows, n, key=lambda window: int(self._pieces(window + 1).sum()))

    def _batches(self, window: int) -> list[tuple[int, int]]:
        """(bucket, piece) of the batches that a window yields, in their order."""
        pieces = zip(self._pieces(window).tolist(), self._pieces(window + 1).tolist(), strict=True)
        listed = [(bucket, piece) for bucket, (start, stop) in enumerate(pieces) for piece in range(start, stop)]
        return [listed[at] for at in _permutation(len(listed), _BATCHES, self.seed, window)]

    def _order(self, window: int, bucket: int, before: int) -> Samples:
        read = self._cache.get(("window", window), lambda: self._read(window, _ALL))
        return self._cache.get(("order", window, bucket), lambda: self._sort(read, window, bucket, before))

    def _sort(self, read: _Read, window: int, bucket: int, before: int) -> Samples:
        """The samples of one bucket in one window, in the order in which they are drawn. before: in earlier ones."""
        samples, buckets, lengths = read
        members = np.flatnonzero(buckets == bucket)
        members = members[_permutation(len(members), _SAMPLES, self.seed, window, bucket)]
        # Chunks begin where a batch does: the first samples complete the batch that an earlier window began.
        head = -before % self.batch_size
        for start in range(head, len(members), _CHUNK_BATCHES * self.batch_size):
            chunk = members[start : start + _CHUNK_BATCHES * self.batch_size]
            chunk[:] = chunk[np.argsort(lengths[chunk], kind="stable")]
        return Samples(*(values[members] for values in samples))

    def _read(self, window: int, buckets: _Buckets) -> _Read:
        """A window's samples of those shards that have some of these buckets."""
        parts = [
            part
            for one, quota in zip(self._sets, self.quotas, strict=True)
            for part in one.read(self._position(window, quota), self._position(window + 1, quota), buckets)
        ]
        id, caption, epoch, bucket, length = map(np.concatenate, zip(*parts, strict=True))
        return Samples(id, caption, epoch), bucket, length


def _quotas(sizes: list[int], weights: list[float | None]) -> list[int]:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return sizes
    if len(given) < len(weights):
        raise UserError("a mixture needs a weight for each of its data sets, or for none")
    return [max(1, round(sum(sizes) * weight / sum(given))) for weight in given]


class _Sequence:
    """The endless sequence of one data set."""

    def __init__(self, table: SampleTable, seed: int, number: int) -> None:
        self._table, self._seed, self._number = table, seed, number
        self.size = int(table.counts.sum())
        self._epochs = _Cache(2)
        self._rows = _Cache(4)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the shards [S], where each begins in the epoch [S + 1], samples by bucket before each [S + 1, B]."""

        def permute() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            counts = self._table.counts
            order = _permutation(len(counts), _SHARDS, self._seed, epoch, self._number)
            before = np.concatenate([np.zeros((1, counts.shape[1]), np.int64), np.cumsum(counts[order], axis=0)])
            return order, before.sum(1), before

        return self._epochs.get(epoch, permute)

    def count_before(self, position: int, buckets: _Buckets) -> np.ndarray:
        """Samples of these buckets before a position of the sequence, int64."""
        epoch, rest = divmod(position, self.size)
        order, starts, before = self._epoch(epoch)
        at = int(np.searchsorted(starts, rest, side="right")) - 1
        total = epoch * before[-1, buckets] + before[at, buckets]
        if rest > starts[at] and self._has(int(order[at]), buckets):
            bucket = self._shard(int(order[at])).bucket[: rest - starts[at]]
            total = total + np.bincount(bucket, minlength=before.shape[1])[buckets]
        return total

    def read(self, start: int, stop: int, buckets: _Buckets) -> Iterator[tuple[np.ndarray, ...]]:
        """(ids, captions, epochs, buckets, caption lengths) of the samples start…stop, a shard at a time.

        Shards that have none of these buckets are left out.
        """
        for epoch, at, first, last in self._pieces(start, stop):
            shard = int(self._epoch(epoch)[0][at])
            if not self._has(shard, buckets):
                continue
            id, bucket, lengths = (values[first:last] for values in self._shard(shard))
            caption = choose_captions(self._seed, epoch, id, lengths, self._table.caption_weights)
            yield id, caption, np.full(len(id), epoch), bucket, lengths[np.arange(len(id)), caption]

    def _has(self, shard: int, buckets: _Buckets) -> bool:
        return bool(self._table.counts[shard, buckets].any())

    def shards_between(self, start: int, stop: int) -> list[int]:
        return [int(self._epoch(epoch)[0][at]) for epoch, at, _, _ in self._pieces(start, stop)]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, place in its order of shards, first row, last row) of the samples start…stop."""
        while start < stop:
            epoch, rest = divmod(start, self.size)
            _, starts, _ = self._epoch(epoch)
            at = int(np.searchsorted(starts, rest, side="right")) - 1
            first = rest - int(starts[at])
            last = min(int(starts[at + 1] - starts[at]), first + stop - start)
            yield epoch, at, first, last
            start += last - first

    def _shard(self, shard: int) -> Rows:
        return self._rows.get(shard, lambda: self._table.rows(shard))


def choose_captions(seed: int, epoch: int, id: np.ndarray, lengths: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Which of its captions each sample shows in an epoch, int64 [n]: by weight, of those it has.

    lengths: int [n, captions], −1 for a caption that is absent; a sample that has none with a weight shows any of the
    others.
    """
    if lengths.shape[1] == 1:
        return np.zeros(len(id), np.int64)
    share = np.where(lengths >= 0, np.asarray(weights, np.float64), 0.0)
    share = np.where(share.sum(1, keepdims=True) > 0, share, lengths >= 0)
    bounds = np.cumsum(share, axis=1)
    uniform = (
        _splitmix64(_splitmix64(_splitmix64(np.uint64(seed)) + np.uint64(epoch)) + id.astype(np.uint64)) * 2.0**-64
    )
    return np.minimum((uniform[:, None] * bounds[:, -1:] >= bounds).sum(1), lengths.shape[1] - 1)


def _splitmix64(value: np.ndarray | np.uint64) -> np.ndarray:
    """Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014): a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _permutation(size: int, *key: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(words, kind="stable")


T = TypeVar("T")


class _Cache:
    """The values of the last few keys asked for; keys of one window count as one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, OrderedDict[Hashable, object]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        group = key[1] if isinstance(key, tuple) else key
        values = self._values.setdefault(group, OrderedDict())
        self._values.move_to_end(group)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        if key not in values:
            values[key] = make()
        return values[key]  # type: ignore[return-value]


def rank_slice(batch: Samples, rank: int, world: int) -> tuple[np.ndarray, Samples]:
    """Rank r of W takes every W-th sample from the r-th on: (positions in the global batch, samples).

    Raises UserError if the batch cannot be cut into `world` equal slices.
    """
    check_division(len(batch.id), world, 1)
    return np.arange(rank, len(batch.id), world), Samples(*(values[rank::world] for values in batch))


class StepSampler:
    """`batch_sampler` of a DataLoader: the draws of one rank, a list a micro-batch, `micro_batches` lists a step.

    Covers the steps start_step … stop_step − 1. Step n takes the plan's batch n; the rank's slice of it is cut in
    order into equal micro-batches. Raises UserError unless batch_size is divisible by world × micro_batches.
    """

    def __init__(
        self, plan: BatchPlan, start_step: int, stop_step: int, rank: int, world: int, micro_batches: int
    ) -> None:
        check_division(plan.batch_size, world, micro_batches)
        self.plan = plan
        self.steps = range(start_step, stop_step)
        self.step = start_step
        """The last step that was asked for."""
        self.rank, self.world, self.micro_batches = rank, world, micro_batches

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        micro_batch_size = self.plan.batch_size // (self.world * self.micro_batches)
        for step in self.steps:
            self.step = step
            positions, samples = rank_slice(self.plan.batch(step), self.rank, self.world)
            columns = positions.tolist(), samples.id.tolist(), samples.caption.tolist()
            draws = [Draw(step, *values) for values in zip(*columns, strict=True)]
            for start in range(0, len(draws), micro_batch_size):
                yield draws[start : start + micro_batch_size]


def check_division(batch_size: int, world: int, micro_batches: int) -> None:
    """UserError where a global batch cannot be cut into equal micro-batches of all ranks."""
    if batch_size % (world * micro_batches):
        raise UserError(
            f"batch_size {batch_size} is not divisible by ranks × accumulation = {world} × {micro_batches}; "
            f"take a multiple of {world * micro_batches}"
        )
