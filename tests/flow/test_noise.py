import math

import pytest
import torch

from stack.flow.noise import NoisePlan


def test_a_draw_depends_on_seed_step_position_and_stream_only() -> None:
    whole = NoisePlan(3).at(7, range(8)).normal("noise", (4, 2, 2))
    for world in (1, 2, 4, 8):
        for rank in range(world):
            draws = NoisePlan(3).at(7, range(rank, 8, world))
            draws.uniform("t")  # other streams and the order of asking do not matter
            assert torch.equal(draws.normal("noise", (4, 2, 2)), whole[rank::world])
    assert torch.equal(NoisePlan(3).at(7, [5, 2]).normal("noise", (4, 2, 2)), whole[[5, 2]])


def test_everything_it_depends_on_changes_it() -> None:
    def draw(seed: int = 0, step: int = 1, position: int = 2, stream: str = "noise") -> float:
        return NoisePlan(seed).at(step, [position]).normal(stream, ()).item()

    values = [
        draw(), draw(seed=1), draw(seed=-1), draw(step=2), draw(step=1 << 40), draw(position=3),
        draw(position=1 << 40), draw(stream="t"), draw(step=2, position=1),
    ]  # fmt: skip
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_moments(dtype: torch.dtype) -> None:
    x = NoisePlan(0).at(0, range(1000)).normal("noise", (256,), dtype)
    assert x.shape == (1000, 256)
    assert x.dtype == dtype
    x = x.double()
    assert abs(x.mean().item()) < 0.01
    assert x.var().item() == pytest.approx(1, abs=0.02)
    assert (x**4).mean().item() == pytest.approx(3, abs=0.1)
    assert abs((x[1:] * x[:-1]).mean().item()) < 0.01  # neighbouring positions


def test_uniform_is_open_and_even() -> None:
    draws = NoisePlan(0).at(0, range(500))
    assert draws.uniform("t").shape == (500,)
    u = draws.uniform("u", (400,))
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1) / u.numel()
    torch.testing.assert_close(counts, torch.full((20,), 0.05), rtol=0.03, atol=0)


def test_the_ends_of_uniform_are_exact_in_float32() -> None:
    ends = torch.tensor([0.5 / (1 << 23), ((1 << 23) - 0.5) / (1 << 23)], dtype=torch.float64)
    assert torch.equal(ends.float().double(), ends)
    assert math.isfinite(torch.special.ndtri(ends.float()).abs().max().item())


def test_values_are_pinned() -> None:
    """A run that is resumed under another version of numpy must go on with these numbers."""
    draws = NoisePlan(1234).at(5, [0, 9])
    torch.testing.assert_close(draws.normal("noise", (2,)).tolist(), PINNED_NORMAL, rtol=0, atol=1e-7)
    assert draws.uniform("t").tolist() == PINNED_UNIFORM


PINNED_NORMAL = [[-1.1216918230056763, 1.1335484981536865], [1.505823016166687, -0.32876405119895935]]
PINNED_UNIFORM = [0.4990125298500061, 0.9030088782310486]
