import torch
from hypothesis import given
from hypothesis import strategies as st

from stack.flow.path import eps_from_velocity, interpolate, score_from_velocity, velocity, x0_from_velocity


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x0, eps


def test_zero_is_data_and_one_is_noise() -> None:
    x0, eps = pair()
    x_t = interpolate(x0, eps, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], eps[1])
    torch.testing.assert_close(x_t[2], 0.75 * x0[2] + 0.25 * eps[2])


@given(st.lists(st.floats(1e-3, 1), min_size=3, max_size=3))
def test_conversions_come_back(times: list[float]) -> None:
    x0, eps = pair()
    t = torch.tensor(times, dtype=torch.float64)
    x_t, v = interpolate(x0, eps, t), velocity(x0, eps)
    torch.testing.assert_close(x0_from_velocity(x_t, v, t), x0)
    torch.testing.assert_close(eps_from_velocity(x_t, v, t), eps)
    torch.testing.assert_close(score_from_velocity(x_t, v, t), -eps / t[:, None, None, None])


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, eps = pair()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    h = 1e-3  # the path is straight, so a difference is the derivative
    derivative = (interpolate(x0, eps, t + h) - interpolate(x0, eps, t)) / h
    torch.testing.assert_close(derivative, velocity(x0, eps))


def test_the_dtype_is_that_of_the_data() -> None:
    x0, eps = pair(torch.float32)
    assert interpolate(x0, eps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).dtype == torch.float32
