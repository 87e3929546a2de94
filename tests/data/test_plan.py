from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stack.config import UserError
from stack.data.plan import BatchPlan, Draw, Rows, Samples, StepSampler, choose_captions, rank_slice

SHARD_SIZES = st.lists(st.sampled_from([0, 1, 2, 7, 16, 30, 61]), min_size=1, max_size=6).filter(any)


class Table:
    """Samples in memory: ids from `first`, buckets and lengths at random."""

    def __init__(
        self,
        sizes: Sequence[int],
        num_buckets: int = 3,
        first: int = 0,
        weight: float | None = None,
        caption_weights: Sequence[float] = (1.0,),
    ) -> None:
        rng = np.random.default_rng(first + 1)
        self.weight, self.caption_weights, self.size = weight, caption_weights, sum(sizes)
        starts = first + np.cumsum([0, *sizes])
        self._rows = [
            Rows(
                np.arange(start, start + size),
                rng.integers(0, num_buckets, size),
                rng.integers(1, 60, (size, len(caption_weights))),
            )
            for start, size in zip(starts.tolist(), sizes, strict=False)
        ]
        self.counts = np.array([np.bincount(rows.bucket, minlength=num_buckets) for rows in self._rows])
        self.bucket = np.concatenate([rows.bucket for rows in self._rows])
        self.length = np.concatenate([rows.caption_length for rows in self._rows])

    def rows(self, shard: int) -> Rows:
        return self._rows[shard]


def _plan(sizes: Sequence[int], batch_size: int, seed: int = 0, window: int = 40, num_buckets: int = 3) -> BatchPlan:
    return BatchPlan([Table(sizes, num_buckets)], batch_size, seed, window)


def _same(one: Samples, other: Samples) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    sizes=SHARD_SIZES,
    num_buckets=st.integers(1, 5),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    window=st.sampled_from([1, 13, 64, 10**6]),
)
def test_each_sample_stands_once_an_epoch(
    sizes: list[int], num_buckets: int, batch_size: int, seed: int, window: int
) -> None:
    """Over three epochs and what completes their last batches, each (sample, epoch) is drawn once."""
    table = Table(sizes, num_buckets)
    plan = BatchPlan([table], batch_size, seed, window)
    drawn: Counter[tuple[int, int]] = Counter()
    n = 0
    while plan.epoch_of(n) < 3:
        batch = plan.batch(n)
        assert batch.id.shape == batch.caption.shape == batch.epoch.shape == (batch_size,)
        assert batch.id.dtype == np.int64
        assert len(set(table.bucket[batch.id].tolist())) == 1
        drawn.update(zip(batch.id.tolist(), batch.epoch.tolist(), strict=True))
        n += 1
    assert set(drawn.values()) <= {1}
    missing = {(sample, epoch) for sample in range(table.size) for epoch in range(3)} - drawn.keys()
    held_back = Counter(table.bucket[sample] for sample, _ in missing)
    assert all(count < batch_size for count in held_back.values())
    smallest = min(table.counts.sum(0)[bucket] for bucket in range(num_buckets) if table.counts.sum(0)[bucket])
    stop = 3 + -(-batch_size // int(smallest))
    while missing:  # the leftovers begin their buckets' next batches
        assert plan.epoch_of(n) <= stop
        missing -= set(zip(plan.batch(n).id.tolist(), plan.batch(n).epoch.tolist(), strict=True))
        n += 1


@settings(max_examples=30, deadline=None)
@given(
    sizes=SHARD_SIZES,
    batch_size=st.integers(1, 30),
    window=st.sampled_from([1, 13, 64, 10**6]),
    order=st.randoms(use_true_random=False),
)
def test_a_batch_depends_on_n_only(sizes: list[int], batch_size: int, window: int, order: object) -> None:
    forward = _plan(sizes, batch_size, window=window)
    batches = [forward.batch(n) for n in range(25)]
    epochs = [forward.epoch_of(n) for n in range(25)]
    assert epochs == sorted(epochs)
    numbers = list(range(25))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    jumping = _plan(sizes, batch_size, window=window)
    for n in numbers:
        assert _same(jumping.batch(n), batches[n])
        assert _same(_plan(sizes, batch_size, window=window).batch(n), batches[n])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(SHARD_SIZES, min_size=2, max_size=3),
    weights=st.lists(st.floats(0.05, 5), min_size=3, max_size=3),
    batch_size=st.integers(1, 20),
    window=st.sampled_from([13, 64, 10**6]),
)
def test_mixtures_keep_to_their_weights_and_to_each_sets_epochs(
    sizes: list[list[int]], weights: list[float], batch_size: int, window: int
) -> None:
    tables = [Table(one, 2, 1000 * d, weights[d]) for d, one in enumerate(sizes)]
    plan = BatchPlan(tables, batch_size, 3, window)
    total, shares = sum(table.size for table in tables), np.array(weights[: len(sizes)])
    drawn: Counter[tuple[int, int]] = Counter()
    n = 0
    while plan.epoch_of(n) < 4:
        batch = plan.batch(n)
        drawn.update(zip(batch.id.tolist(), batch.epoch.tolist(), strict=True))
        n += 1
    assert set(drawn.values()) <= {1}  # never twice in one epoch of its data set
    for d, table in enumerate(tables):
        count = sum(1 for sample, _ in drawn if sample // 1000 == d)
        expected = 4 * max(1, round(total * weights[d] / shares.sum()))
        assert expected - 2 * batch_size < count <= expected
        # Epoch e of a data set is begun only where its epochs before are taken, but for what is held back.
        last = max((epoch for sample, epoch in drawn if sample // 1000 == d), default=0)
        taken = Counter(epoch for sample, epoch in drawn if sample // 1000 == d)
        assert sum(table.size - taken[epoch] for epoch in range(last)) < 2 * batch_size


def test_without_weights_a_mixture_takes_each_sample_once() -> None:
    plan = BatchPlan([Table([30, 7], 1), Table([61], 1, 1000)], 7, 0, 20)
    seen = np.concatenate([plan.batch(n).id for n in range(14)])
    assert sorted(seen.tolist()) == [*range(37), *range(1000, 1061)]
    assert len({sample // 1000 for sample in plan.batch(0).id.tolist()}) == 2  # mixed within a batch


def test_a_mixture_with_some_weights_is_refused() -> None:
    with pytest.raises(UserError, match="a weight for each"):
        BatchPlan([Table([3], weight=1.0), Table([3])], 2, 0)


def test_epochs_of_a_single_bucket() -> None:
    plan = _plan([30], 8, num_buckets=1)  # 3, 7, 11, 15 batches through the first epochs
    assert [plan.epoch_of(n) for n in range(15)] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4
    assert plan.epoch_of(10**9) == (8 * (10**9 + 1) - 1) // 30


def test_far_steps_are_cheap() -> None:
    assert _plan([1, 61, 30], 16).batch(10**9).id.shape == (16,)


def test_a_rare_buckets_batch_is_that_of_windows_read_whole_and_reads_the_shards_that_have_it(monkeypatch) -> None:
    """One sample in 800, a batch of 16: it is gathered from some 140 windows, three shards each."""
    table, reads = Table([40] * 1000, num_buckets=1), []
    table.counts = np.pad(table.counts, ((0, 0), (0, 1)))
    for shard in range(3, 1000, 20):
        table.rows(shard).bucket[shard % 40] = 1
        table.bucket[40 * shard + shard % 40] = 1
        table.counts[shard] += (-1, 1)
    monkeypatch.setattr(table, "rows", lambda shard: reads.append(shard) or table._rows[shard])
    plan = BatchPlan([table], 16, seed=0, window=90)
    rare = [n for n in range(3 * plan.num_samples // 16) if plan.batch(n).id[0] in np.flatnonzero(table.bucket == 1)]
    assert len(rare) == 3 * 50 // 16
    for n in rare:
        cold = BatchPlan([table], 16, seed=0, window=90)
        cold.window_of(n)
        reads.clear()
        assert _same(cold.batch(n), plan.batch(n))
        assert len(reads) < 60
    monkeypatch.setattr("stack.data.plan._CACHED_WINDOWS", 10**6)
    whole = BatchPlan([table], 16, seed=0, window=90)
    assert all(_same(whole.batch(n), plan.batch(n)) for n in rare)


def test_a_window_stays_in_few_shards() -> None:
    """Reads stay local: the samples of some hundred steps stand in the shards of a window and the one before."""
    plan = BatchPlan([Table([50] * 40, 1)], 10, 0, 200)
    for first in range(0, 200, 20):
        shards = {int(sample) // 50 for n in range(first, first + 20) for sample in plan.batch(n).id}
        assert len(shards) <= 5
        windows = range(plan.window_of(first) - 1, plan.window_of(first + 19) + 1)
        assert shards <= {shard for window in windows if window >= 0 for _, shard in plan.shards_of(window)}
    orders = [[shard for window in range(e, e + 10) for _, shard in plan.shards_of(window)] for e in (0, 10)]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1]) == set(range(40))


def test_seeds_and_epochs_differ() -> None:
    plan, other = _plan([61], 61, num_buckets=1, window=100), _plan([61], 61, seed=1, num_buckets=1, window=100)
    assert not np.array_equal(plan.batch(0).id, plan.batch(1).id)
    assert not np.array_equal(plan.batch(0).id, other.batch(0).id)
    table = Table([16] * 10, 2)
    mixed = BatchPlan([table], 2, 0, 1000)
    order = [[table.bucket[mixed.batch(n).id[0]] for n in range(e, e + 80)] for e in (0, 80)]
    assert order[0] != order[1]
    assert order[0] != sorted(order[0])


def test_the_plan_is_the_same_on_every_machine() -> None:
    """Fixed values: a change here breaks the resume of everybody's runs."""
    table = Table([5, 0, 4, 3], 2, caption_weights=(1.0, 2.0))
    plan = BatchPlan([table, Table([4], 2, 100, caption_weights=(1.0, 2.0))], 2, seed=7, window=6)
    batches = [plan.batch(n) for n in range(8)]
    assert [batch.id.tolist() for batch in batches] == GOLDEN_IDS
    assert [batch.caption.tolist() for batch in batches] == GOLDEN_CAPTIONS


GOLDEN_IDS = [[8, 100], [7, 6], [9, 101], [5, 11], [10, 0], [4, 103], [3, 1], [102, 2]]
GOLDEN_CAPTIONS = [[0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [0, 0], [1, 0]]


def test_like_lengths_stand_together() -> None:
    table = Table([512] * 8, 1)
    plan = BatchPlan([table], 16, 0, 4096)
    lengths = table.length[:, 0]
    spans = [np.ptp(lengths[plan.batch(n).id]) for n in range(256)]
    assert np.mean(spans) < 6  # 45 in random batches
    means = [lengths[plan.batch(n).id].mean() for n in range(256)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # long captions are not the end of the epoch


def test_captions_are_drawn_by_weight_among_those_present() -> None:
    id = np.arange(40_000)
    lengths = np.ones((len(id), 3), np.int64)
    lengths[::2, 2] = -1
    first, again = (choose_captions(5, 0, id, lengths, (1.0, 1.0, 2.0)) for _ in range(2))
    assert np.array_equal(first, again)
    shares = np.bincount(first[1::2], minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.015)
    np.testing.assert_allclose(np.bincount(first[::2], minlength=3) / 20_000, [0.5, 0.5, 0], atol=0.015)
    for other in (choose_captions(5, 1, id, lengths, (1.0, 1.0, 2.0)), choose_captions(6, 0, id, lengths, (1, 1, 2))):
        assert abs(np.mean(other[1::2] == first[1::2]) - 0.375) < 0.02  # as independent draws agree
    alone = choose_captions(5, 0, id, lengths, (0.0, 0.0, 1.0))
    assert set(alone[1::2].tolist()) == {2}
    assert set(alone[::2].tolist()) == {0, 1}  # of a weight of nothing, any that is there


def test_the_caption_of_a_sample_is_that_of_its_epoch() -> None:
    table = Table([30], 1, caption_weights=(1.0, 1.0))
    plan = BatchPlan([table], 10, 0)
    for n in range(9):
        batch = plan.batch(n)
        expected = choose_captions(0, n // 3, batch.id, table.length[batch.id], (1.0, 1.0))
        assert np.array_equal(batch.caption, expected)
    assert len({tuple(plan.batch(n).caption[np.argsort(plan.batch(n).id)].tolist()) for n in (0, 3, 6)}) == 3


@settings(max_examples=30, deadline=None)
@given(
    sizes=SHARD_SIZES,
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
        assert [drawn[position] for position in range(batch_size)] == plan.batch(step).id.tolist()


def test_rank_slice() -> None:
    columns = np.arange(100, 112)
    positions, samples = rank_slice(Samples(columns, columns % 2, columns * 0), 1, 4)
    assert positions.tolist() == [1, 5, 9]
    assert samples.id.tolist() == [101, 105, 109]


def test_batch_size_that_does_not_divide_names_both() -> None:
    with pytest.raises(UserError, match=r"batch_size 30 .* 4 × 2"):
        StepSampler(_plan([30], 30), 0, 1, 0, 4, 2)
    with pytest.raises(UserError, match=r"batch_size 30 .* 4 × 1"):
        rank_slice(Samples(*[np.arange(30)] * 3), 0, 4)


def test_nothing_to_plan_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no samples"):
        BatchPlan([], 4, 0)
    with pytest.raises(UserError, match="batch_size"):
        _plan([3], 0)


class _Echo:
    def __getitems__(self, draws: list[Draw]) -> list[Draw]:
        return draws


@settings(max_examples=6, deadline=None)
@given(sizes=SHARD_SIZES, workers=st.integers(0, 2))
def test_in_a_data_loader(sizes: list[int], workers: int) -> None:
    sampler = StepSampler(_plan(sizes, 8), 3, 9, 1, 2, 2)
    loader = DataLoader(_Echo(), batch_sampler=sampler, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    assert list(loader) == list(sampler)
    assert all(type(value) is int for draws in sampler for draw in draws for value in draw)
