import itertools

import pytest
import torch

from stack.config import UserError
from stack.flow.coupling import CouplingConfig, assignment
from stack.flow.noise import NoisePlan

DRAWS = NoisePlan(0).at(3, range(6))
X0 = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(1))


def cost(x0: torch.Tensor, eps: torch.Tensor) -> float:
    return float((x0 - eps).square().sum())


def test_optimal_transport_is_the_cheapest_of_all_pairings() -> None:
    own = CouplingConfig().noise(X0, DRAWS, 6)
    assert torch.equal(own, DRAWS.normal("noise", (3, 2)))
    paired = CouplingConfig(kind="optimal_transport").noise(X0, DRAWS, 6)
    best = min(cost(X0, own[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(X0, paired) == pytest.approx(best, rel=1e-6)
    assert sorted(assignment(X0, own).tolist()) == list(range(6))
    assert torch.equal(CouplingConfig(kind="optimal_transport").noise(X0, DRAWS, None), own)


def test_optimal_transport_needs_the_whole_batch() -> None:
    with pytest.raises(UserError, match=r"pairs the whole batch of 12, and a rank has 6 of it at once.*immiscible"):
        CouplingConfig(kind="optimal_transport").noise(X0, DRAWS, 12)


def test_immiscible_noise_is_near_and_belongs_to_the_sample_alone() -> None:
    config = CouplingConfig(kind="immiscible", candidates=8)
    whole = config.noise(X0, DRAWS, 6)
    own = CouplingConfig().noise(X0, DRAWS, 6)
    assert ((X0 - whole).flatten(1).norm(dim=1) <= (X0 - own).flatten(1).norm(dim=1)).all()
    assert cost(X0, whole) < cost(X0, own)
    for row in range(6):
        alone = config.noise(X0[row : row + 1], NoisePlan(0).at(3, [row]), 6)
        assert torch.equal(alone[0], whole[row])


def test_pairs_have_no_noise() -> None:
    with pytest.raises(ValueError, match=r"paired draws no noise"):
        CouplingConfig(kind="paired").noise(X0, DRAWS, 6)
