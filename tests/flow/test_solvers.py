"""The flow between a Gaussian and noise has a closed form: all points keep their number of standard deviations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stack.flow import samplers, solvers
from stack.flow.path import EDM, VP, Path
from stack.flow.process import FlowConfig
from stack.flow.solvers import VelocityFn, dopri5, euler, heun, midpoint, rk4

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x: Tensor, t_B: Tensor) -> Tensor:
    """E[ε − x_0 | x_t = x] for x_0 ~ N(MEAN, STD²)."""
    t = t_B[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "dpm_solver_pp_2m": 2}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("path", "last"), [(VP(), 0.3), (EDM(sigma_min=0.05, sigma_max=5), 0.1)], ids=["vp", "edm"])
def test_order_of_convergence(gaussian, name: str, path: Path, last: float) -> None:
    """On the linear path the midpoint rule shows order 3 with Gaussian data, so others stand here."""
    flow = FlowConfig(path=path, prediction="v")
    predict = flow.predictor(gaussian.network(flow))
    x1 = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = path.at(torch.tensor([1.0, last], dtype=torch.float64))
    std = (ends.a**2 * gaussian.variances + ends.b**2).sqrt()
    exact = ends.a[1] * gaussian.means + std[1] / std[0] * (x1 - ends.a[0] * gaussian.means)

    def error(num_steps: int) -> float:
        grid = torch.linspace(1.0, last, num_steps + 1, dtype=torch.float64)
        if hasattr(samplers, name):
            found = getattr(samplers, name)(flow.estimate_fn(predict), x1, grid, path)
        else:
            found = getattr(solvers, name)(flow.velocity_fn(predict), x1, grid)
        return (found - exact).abs().max().item()

    steps = [64, 128, 256]
    slope = np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0]
    assert slope == pytest.approx(-ORDERS[name], abs=0.1)


@pytest.mark.parametrize("solve", [euler, heun, rk4])
def test_order_on_a_shifted_grid(solve: Callable[..., Tensor]) -> None:
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    steps = [128, 256, 512]
    errors = [
        (solve(gaussian_velocity, x1, FlowConfig().grid(n, 2.0)) - MEAN - STD * x1).abs().max().item() for n in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-ORDERS[solve.__name__], abs=0.1)


def test_a_straight_flow_takes_one_step() -> None:
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(euler(lambda x, t: x1 - x0, x1, FlowConfig().grid(1)), x0)


def test_grid_runs_from_noise_to_data() -> None:
    assert FlowConfig().grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    grid = FlowConfig().grid(10, 3.0)
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("solve", [euler, heun, midpoint, rk4, dopri5])
def test_dtype_of_state_and_time(solve: Callable[[VelocityFn, Tensor, Tensor], Tensor]) -> None:
    seen = []

    def velocity_fn(x: Tensor, t_B: Tensor) -> Tensor:
        seen.append((x.dtype, t_B.dtype, t_B.shape))
        return gaussian_velocity(x.float(), t_B)

    assert solve(velocity_fn, torch.zeros(3, 1), FlowConfig().grid(4)).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32, (3,))}


def test_gradients_flow_through() -> None:
    x1 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: heun(gaussian_velocity, x, FlowConfig().grid(5)), (x1,))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_adaptive_steps_keep_to_their_tolerance(tolerance: float) -> None:
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    calls = []

    def velocity_fn(x: Tensor, t_B: Tensor) -> Tensor:
        calls.append(t_B)
        return gaussian_velocity(x, t_B)

    x0 = dopri5(velocity_fn, x1, FlowConfig().grid(1), rtol=tolerance, atol=tolerance)
    error = (x0 - MEAN - STD * x1).abs().max().item()
    assert error < 10 * tolerance
    assert len(calls) < 60 + 2 * tolerance**-0.2 * 6
    torch.testing.assert_close(
        dopri5(gaussian_velocity, x0, FlowConfig().grid(1).flip(0), rtol=tolerance, atol=tolerance),
        x1, atol=60 * tolerance, rtol=0,
    )  # fmt: skip


def test_a_tolerance_that_cannot_be_met_is_said() -> None:
    with pytest.raises(ValueError, match="steps vanish before rtol 1e-05"):
        dopri5(lambda x, t_B: x * float("nan"), torch.ones(2, 1), FlowConfig().grid(1))


@pytest.mark.parametrize("solve", [euler, heun, midpoint, rk4, dopri5])
def test_a_trajectory_is_kept(solve: Callable[..., Tensor]) -> None:
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    kept: list[Tensor] = []
    grid = FlowConfig().grid(40)
    x0 = solve(gaussian_velocity, x1, grid, kept)
    assert torch.equal(x0, solve(gaussian_velocity, x1, grid))
    assert torch.equal(kept[-1], x0)
    assert len(kept) == 40
    for t, x in zip(grid[1:].tolist(), kept, strict=True):
        exact = (1 - t) * MEAN + ((1 - t) ** 2 * STD**2 + t**2) ** 0.5 * x1
        torch.testing.assert_close(x, exact, atol=5e-4 if solve in (rk4, dopri5) else 0.05, rtol=0)
