from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stack.config import UserError
from stack.data.plan import BatchPlan, Draw, StepSampler, rank_slice

BUCKET_SIZES = st.lists(st.sampled_from([1, 2, 3, 7, 16, 30, 61]), min_size=1, max_size=4)


def _plan(sizes: list[int], batch_size: int, seed: int = 0) -> BatchPlan:
    """Samples of all buckets mixed, bucket ids not consecutive."""
    rng = np.random.default_rng(1)
    buckets = rng.permutation(np.repeat(2 * np.arange(len(sizes)) + 1, sizes))
    return BatchPlan(buckets, rng.integers(1, 60, len(buckets)), batch_size, seed)


def _buckets_of(sizes: list[int]) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.repeat(2 * np.arange(len(sizes)) + 1, sizes))


@settings(max_examples=60, deadline=None)
@given(sizes=BUCKET_SIZES, batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_each_sample_stands_once_an_epoch(sizes: list[int], batch_size: int, seed: int) -> None:
    """Bucket by bucket, the samples in the order of their pieces are one permutation after the other."""
    plan, buckets = _plan(sizes, batch_size, seed), _buckets_of(sizes)
    num_epochs, n = 3, 0
    sequences: dict[int, dict[int, np.ndarray]] = {}
    while (epoch := plan.epoch_of(n)) < num_epochs:
        batch = plan.batch(n)
        assert batch.shape == (batch_size,)
        assert batch.dtype == np.int64
        (bucket,) = set(buckets[batch].tolist())
        piece = int(plan._batches[n - plan._num_batches(epoch)][1])
        assert piece not in sequences.setdefault(bucket, {})
        sequences[bucket][piece] = batch
        n += 1
    for bucket, pieces in sequences.items():
        members = np.flatnonzero(buckets == bucket)
        assert sorted(pieces) == list(range(num_epochs * len(members) // batch_size))  # nothing dropped
        drawn = np.concatenate([pieces[piece] for piece in sorted(pieces)])
        for start in range(0, len(drawn) - len(members) + 1, len(members)):
            assert np.array_equal(np.sort(drawn[start : start + len(members)]), members)
        assert len(np.unique(drawn[len(drawn) // len(members) * len(members) :])) == len(drawn) % len(members)


@settings(max_examples=40, deadline=None)
@given(sizes=BUCKET_SIZES, batch_size=st.integers(1, 30))
def test_counts_never_differ_by_more_than_the_open_epoch(sizes: list[int], batch_size: int) -> None:
    """Seen from outside: after all batches of E epochs every sample stood E times, but for what is held back."""
    plan = _plan(sizes, batch_size)
    steps = plan._num_batches(4)
    counts = Counter(int(i) for n in range(steps) for i in plan.batch(n))
    held_back = 4 * plan.num_samples - sum(counts.values())
    assert 0 <= held_back < len(sizes) * batch_size
    assert max(counts.values(), default=4) <= 4
    assert sum(4 - counts[i] for i in range(plan.num_samples)) == held_back


@settings(max_examples=40, deadline=None)
@given(sizes=BUCKET_SIZES, batch_size=st.integers(1, 30), order=st.randoms(use_true_random=False))
def test_a_batch_depends_on_n_only(sizes: list[int], batch_size: int, order: object) -> None:
    forward = _plan(sizes, batch_size)
    batches = [forward.batch(n) for n in range(25)]
    epochs = [forward.epoch_of(n) for n in range(25)]
    assert epochs == sorted(epochs)
    numbers = list(range(25))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    jumping = _plan(sizes, batch_size)
    for n in numbers:
        assert np.array_equal(jumping.batch(n), batches[n])
        assert np.array_equal(_plan(sizes, batch_size).batch(n), batches[n])


def test_epochs_of_a_single_bucket() -> None:
    plan = _plan([30], 8)  # 3, 7, 11, 15 batches through the first epochs
    assert [plan.epoch_of(n) for n in range(15)] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4
    assert plan.epoch_of(10**9) == (8 * (10**9 + 1) - 1) // 30


def test_far_steps_are_cheap() -> None:
    plan = _plan([1, 61, 30], 16)
    assert plan.batch(10**9).shape == (16,)


def test_seeds_and_epochs_differ() -> None:
    plan, other = _plan([61], 61), _plan([61], 61, seed=1)
    assert not np.array_equal(plan.batch(0), plan.batch(1))
    assert not np.array_equal(plan.batch(0), other.batch(0))
    mixed = _plan([16, 16], 2)
    order = [[_buckets_of([16, 16])[mixed.batch(n)][0] for n in range(e, e + 16)] for e in (0, 16)]
    assert order[0] != order[1]
    assert order[0] != sorted(order[0])


def test_the_plan_is_the_same_on_every_machine() -> None:
    """Fixed values: a change here breaks the resume of everybody's runs."""
    plan = BatchPlan(np.array([0, 0, 0, 0, 0, 1, 1, 1]), np.array([5, 1, 4, 2, 3, 9, 8, 7]), 2, seed=7)
    assert [plan.batch(n).tolist() for n in range(8)] == [
        [1, 3],
        [7, 6],
        [4, 2],
        [7, 5],
        [2, 0],
        [0, 1],
        [5, 6],
        [3, 4],
    ]


def test_like_lengths_stand_together() -> None:
    lengths = np.random.default_rng(0).integers(10, 61, 4096)
    plan = BatchPlan(np.zeros(4096, int), lengths, 16, seed=0)
    spans = [np.ptp(lengths[plan.batch(n)]) for n in range(256)]
    assert np.mean(spans) < 6  # 45 in random batches
    means = [lengths[plan.batch(n)].mean() for n in range(256)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # long captions are not the end of the epoch


@settings(max_examples=40, deadline=None)
@given(
    sizes=BUCKET_SIZES,
    micro_batch_size=st.integers(1, 4),
    world=st.integers(1, 6),
    micro_batches=st.integers(1, 4),
    start=st.integers(0, 20),
)
def test_ranks_share_out_the_batch(
    sizes: list[int], micro_batch_size: int, world: int, micro_batches: int, start: int
) -> None:
    batch_size = micro_batch_size * world * micro_batches
    stop = start + 5
    union: dict[int, dict[int, int]] = {}
    for rank in range(world):
        sampler = StepSampler(_plan(sizes, batch_size), start, stop, rank, world, micro_batches)
        items = list(sampler)
        assert len(items) == len(sampler) == 5 * micro_batches
        assert all(len(draws) == micro_batch_size for draws in items)
        assert [draws[0].step for draws in items] == [step for step in range(start, stop) for _ in range(micro_batches)]
        assert list(sampler) == items
        full = list(StepSampler(_plan(sizes, batch_size), 0, stop, rank, world, micro_batches))
        assert full[start * micro_batches :] == items
        for draw in (draw for draws in items for draw in draws):
            assert draw.position % world == rank
            assert draw.position not in union.setdefault(draw.step, {})
            union[draw.step][draw.position] = draw.sample_id
    plan = _plan(sizes, batch_size)
    for step, drawn in union.items():
        assert [drawn[position] for position in range(batch_size)] == plan.batch(step).tolist()


def test_rank_slice() -> None:
    positions, ids = rank_slice(np.arange(100, 112), 1, 4)
    assert positions.tolist() == [1, 5, 9]
    assert ids.tolist() == [101, 105, 109]


def test_batch_size_that_does_not_divide_names_both() -> None:
    with pytest.raises(UserError, match=r"batch_size 30 .* 4 × 2"):
        StepSampler(_plan([30], 30), 0, 1, 0, 4, 2)
    with pytest.raises(UserError, match=r"batch_size 30 .* 4 × 1"):
        rank_slice(np.arange(30), 0, 4)


def test_nothing_to_plan_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no samples"):
        BatchPlan(np.empty(0, int), np.empty(0, int), 4, 0)
    with pytest.raises(UserError, match="batch_size"):
        BatchPlan(np.zeros(3, int), np.zeros(3, int), 0, 0)


class _Echo:
    def __getitem__(self, draw: Draw) -> Draw:
        return draw


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers: int) -> None:
    sampler = StepSampler(_plan([7, 30], 8), 3, 9, 1, 2, 2)
    loader = DataLoader(_Echo(), batch_sampler=sampler, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    assert list(loader) == list(sampler)
    assert all(type(value) is int for draws in sampler for draw in draws for value in draw)
