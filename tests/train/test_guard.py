from __future__ import annotations

import pytest
import torch
from torch import nn

from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig
from stack.train.guard import Guard, NonFiniteError


def test_a_non_finite_step_changes_nothing():
    network = nn.Linear(3, 1)
    engine = LocalEngine(network, OptimConfig(lr=0.1), ParallelConfig(), torch.device("cpu"))
    engine.backward(network(torch.ones(2, 3)).mean())
    assert engine.step(0.1).applied
    state = {name: tensor.clone() for name, tensor in engine.optimizer.state[network.weight].items()}
    weights = network.weight.detach().clone()
    engine.backward(network(torch.full((2, 3), float("nan"))).mean())
    info = engine.step(0.1)
    assert not info.applied
    assert torch.equal(network.weight, weights)
    assert all(torch.equal(engine.optimizer.state[network.weight][name], value) for name, value in state.items())


def test_so_many_in_a_row_end_the_run_and_name_the_samples():
    guard = Guard(max_in_a_row=2)
    guard.check(False, 4, ["a"])
    guard.check(True, 5, ["b"])
    guard.check(False, 6, ["c"])
    with pytest.raises(NonFiniteError, match="samples of step 7: d, e"):
        guard.check(False, 7, ["e", "d"])
    assert guard.skipped == 3
