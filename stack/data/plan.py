"""The batch plan: which samples stand in global batch n is a pure function of (index, seed, n).

It does not know ranks, workers or restarts. To resume is to go on with the next n; another number of ranks cuts the
same batches in other slices.

Bucket b with N_b samples has an endless sequence: a permutation of its samples for each epoch, one after the other. Its
batches are consecutive pieces of batch_size, so what is left over at the end of an epoch begins the next one's first
batch, and each sample stands in each epoch exactly once. Through epoch e, bucket b has yielded
⌊(e + 1)·N_b / batch_size⌋ batches; those an epoch adds, of all buckets, are shuffled among each other.

Random numbers: a permutation is the order of raw 64-bit words of Philox seeded by SeedSequence([stream, seed, epoch,
bucket]). NumPy keeps both of these streams stable over versions, which it does not promise for Generator.permutation.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from stack.config import UserError

_SAMPLES, _BATCHES = 0, 1  # random streams
_CHUNK_BATCHES = 16  # captions are sorted by length inside chunks of so many batches


class Draw(NamedTuple):
    """One sample of one step. `position` is its index in the global batch, which the noise plan goes by."""

    step: int
    position: int
    sample_id: int


class BatchPlan:
    """Batches of one bucket each, in which captions of like length stand together.

    Args:
        buckets: bucket id of each sample, int [num_samples].
        lengths: caption length of each sample, int [num_samples], in any unit.
        batch_size: samples in a global batch.
        seed: not negative.

    Raises UserError for no samples or a batch size below 1.
    """

    def __init__(self, buckets: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        assert buckets.shape == lengths.shape, (buckets.shape, lengths.shape)
        if len(buckets) == 0:
            raise UserError("the data set has no samples: nothing can be planned")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.num_samples = len(buckets)
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = np.asarray(lengths)
        self._members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        self._epoch = -1
        self._batches: np.ndarray = np.empty((0, 2), np.int64)  # (bucket, piece) in the order of the cached epoch
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # (bucket, epoch) → sample ids

    def batch(self, n: int) -> np.ndarray:
        """Sample ids of global batch `n`, int64 [batch_size], all of one bucket."""
        epoch = self.epoch_of(n)
        if epoch != self._epoch:
            self._enter(epoch)
        bucket, piece = self._batches[n - self._num_batches(epoch)]
        return self._cut(int(bucket), int(piece) * self.batch_size)

    def epoch_of(self, n: int) -> int:
        """The epoch, from 0, that yields batch `n`."""
        assert n >= 0, n
        # A bucket holds back less than one batch, so all of them together less than one each.
        last = (n + 1 + len(self._members)) * self.batch_size // self.num_samples + 1
        return bisect.bisect_right(range(last), n, key=lambda epoch: self._num_batches(epoch + 1))

    def _num_batches(self, epochs: int) -> int:
        """Batches in the first `epochs` epochs."""
        return sum(self._num_pieces(bucket, epochs) for bucket in range(len(self._members)))

    def _num_pieces(self, bucket: int, epochs: int) -> int:
        return epochs * len(self._members[bucket]) // self.batch_size

    def _enter(self, epoch: int) -> None:
        pieces = [
            (bucket, piece)
            for bucket in range(len(self._members))
            for piece in range(self._num_pieces(bucket, epoch), self._num_pieces(bucket, epoch + 1))
        ]
        self._batches = np.array(pieces, np.int64)[self._permutation(_BATCHES, epoch, 0, len(pieces))]
        self._orders = {at: order for at, order in self._orders.items() if epoch - 1 <= at[1] <= epoch}
        self._epoch = epoch

    def _cut(self, bucket: int, start: int) -> np.ndarray:
        size, stop = len(self._members[bucket]), start + self.batch_size
        epochs = range(start // size, (stop - 1) // size + 1)
        orders = [self._order(bucket, epoch) for epoch in epochs]
        skipped = epochs.start * size
        return np.concatenate(orders)[start - skipped : stop - skipped]

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        if (bucket, epoch) not in self._orders:
            members = self._members[bucket]
            order = members[self._permutation(_SAMPLES, epoch, bucket, len(members))]
            # Chunks begin where a batch does: the first samples complete the batch that the epoch before began.
            head = -epoch * len(members) % self.batch_size
            for start in range(head, len(order), _CHUNK_BATCHES * self.batch_size):
                chunk = order[start : start + _CHUNK_BATCHES * self.batch_size]
                chunk[:] = chunk[np.argsort(self._lengths[chunk], kind="stable")]
            self._orders[bucket, epoch] = order
        return self._orders[bucket, epoch]

    def _permutation(self, stream: int, epoch: int, bucket: int, size: int) -> np.ndarray:
        words = np.random.Philox(np.random.SeedSequence([stream, self.seed, epoch, bucket])).random_raw(size)
        return np.argsort(words, kind="stable")


def rank_slice(batch: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank r of W takes every W-th sample from the r-th on: (positions in the global batch, sample ids).

    Raises UserError if the batch cannot be cut into `world` equal slices.
    """
    check_division(len(batch), world, 1)
    return np.arange(rank, len(batch), world), batch[rank::world]


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
        self.rank, self.world, self.micro_batches = rank, world, micro_batches

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        micro_batch_size = self.plan.batch_size // (self.world * self.micro_batches)
        for step in self.steps:
            positions, ids = rank_slice(self.plan.batch(step), self.rank, self.world)
            draws = [Draw(step, *pair) for pair in zip(positions.tolist(), ids.tolist(), strict=True)]
            for start in range(0, len(draws), micro_batch_size):
                yield draws[start : start + micro_batch_size]


def check_division(batch_size: int, world: int, micro_batches: int) -> None:
    """UserError where a global batch cannot be cut into equal micro-batches of all ranks."""
    if batch_size % (world * micro_batches):
        raise UserError(
            f"batch_size {batch_size} is not divisible by ranks × accumulation = {world} × {micro_batches}; "
            f"take a multiple of {world * micro_batches}"
        )
