"""The flow between a Gaussian and noise has a closed form: all points keep their number of standard deviations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stack.flow.solvers import VelocityFn, euler, heun, times

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x: Tensor, t_B: Tensor) -> Tensor:
    """E[ε − x_0 | x_t = x] for x_0 ~ N(MEAN, STD²)."""
    t = t_B[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(solve: Callable[[VelocityFn, Tensor, Tensor], Tensor], order: int, shift: float) -> None:
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = MEAN + STD * x1
    steps = [128, 256, 512, 1024]
    errors = [(solve(gaussian_velocity, x1, times(n, shift)) - exact).abs().max().item() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.1)


def test_a_straight_flow_takes_one_step() -> None:
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(euler(lambda x, t: x1 - x0, x1, times(1)), x0)


def test_grid_runs_from_noise_to_data() -> None:
    assert times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    grid = times(10, 3.0)
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("solve", [euler, heun])
def test_dtype_of_state_and_time(solve: Callable[[VelocityFn, Tensor, Tensor], Tensor]) -> None:
    seen = []

    def velocity_fn(x: Tensor, t_B: Tensor) -> Tensor:
        seen.append((t_B.dtype, t_B.shape))
        return gaussian_velocity(x.float(), t_B).bfloat16()

    assert solve(velocity_fn, torch.zeros(3, 1), times(4)).dtype == torch.float32
    assert set(seen) == {(torch.float32, (3,))}


def test_gradients_flow_through() -> None:
    x1 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: heun(gaussian_velocity, x, times(5)), (x1,))
