from __future__ import annotations

import pytest
import torch

from stack.parallel.engine import StepInfo
from stack.train import metrics
from stack.train.metrics import Sums
from stack.train.objective import Losses


def line(sums: Sums) -> dict:
    sums.add("step_s", 0.5)
    sums.add("steps", 1)
    return sums.line(StepInfo(True, 2.0), 1e-3, done=7, size=8)


def test_loss_by_quarters_of_the_timestep():
    sums = Sums()
    error, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.1, 0.2, 0.6, 1.0])
    sums.add_losses(Losses(error.mean(), by_time=(error, t)), accumulate=1)
    told = line(sums)
    assert (told["loss"], told["loss_t0"], told["loss_t2"], told["loss_t3"]) == (3.75, 1.5, 4.0, 8.0)
    assert "loss_t1" not in told  # no sample was there
    assert told["samples_per_s"] == 16
    assert not sums.values


def test_operations_are_those_of_all_micro_batches(monkeypatch):
    for peak in (None, 24.0):
        monkeypatch.setattr(metrics, "peak_tflops", lambda device, peak=peak: peak)
        sums = Sums()
        for _ in range(2):
            sums.add_losses(Losses(torch.tensor(1.0), flop=3 * 10**12), accumulate=2)
        told = line(sums)
        assert told["tflops_per_s"] == 12
        assert told.get("mfu") == (peak and 0.5)


def test_sums_go_on_after_a_change_of_the_number_of_ranks():
    sums = Sums([{"loss": 1.0, "steps": 2}, {"loss": 3.0, "steps": 2}])
    assert dict(sums.values) == {"loss": 2.0, "steps": 2}


def test_a_rank_that_goes_on_being_slow_is_named_once(monkeypatch, capsys):
    seconds = [0.1, 0.1, 0.3]
    monkeypatch.setattr(metrics.dist, "world_size", lambda: 3)
    monkeypatch.setattr(metrics.dist, "all_gather", lambda value: [(s, f"node{i}") for i, s in enumerate(seconds)])
    sums = Sums()
    for _ in range(5):
        assert sums._straggler(0.1) == {"slowest_rank": 2, "slowest_own_s": 0.3}
    assert capsys.readouterr().err.count("rank 2 on node2 is slow: 0.300 s a step, median 0.100 s") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_slow_now_and_then_is_not_named(monkeypatch, capsys, rank):
    monkeypatch.setattr(metrics.dist, "world_size", lambda: 2)
    sums = Sums()
    for slow in (rank, 1 - rank) * 4:
        seconds = [(0.3 if i == slow else 0.1, "node") for i in range(2)]
        monkeypatch.setattr(metrics.dist, "all_gather", lambda value, seconds=seconds: seconds)
        assert sums._straggler(0.1)["slowest_rank"] == slow
    assert capsys.readouterr().err == ""
