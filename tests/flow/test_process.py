"""The loss' weights against their papers' forms, and what a network is given and says."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from stack.flow.noise import NoisePlan
from stack.flow.path import DDPM, EDM, VE, VP, Cosine, Linear, Path
from stack.flow.prediction import Prediction, estimate
from stack.flow.process import FlowConfig, WeightConfig
from stack.flow.timesteps import TimestepConfig

T = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
X0, EPS, ERROR = torch.randn(3, 5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PATHS = [Linear(), VP(), Cosine(), VE(), EDM()]


def losses(path: Path, prediction: Prediction, timesteps: TimestepConfig | None = None, **weight) -> Tensor:
    """Of an output with some error: weighted, [5], and the errors of data and noise that it stands for."""
    flow = FlowConfig(
        path=path, prediction=prediction, timesteps=timesteps or TimestepConfig(), weight=WeightConfig(**weight)
    )
    example = flow.example(X0, EPS, T)
    output = example.target + example.target.abs().mean() * ERROR  # so that float32 keeps it
    loss_B = flow.loss_B(output, example)
    said = flow.predictor(lambda x, t: output)(example.x_t, T)
    found = estimate(prediction, path, said, example.x_t, T, flow.sigma_data)
    return loss_B, *((a - b).square().flatten(1).mean(1) for a, b in zip(found, (X0, EPS), strict=True))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_weights_are_the_papers_whatever_the_network_says(path: Path, prediction: Prediction) -> None:
    c = path.at(T)
    snr = (c.a / c.b) ** 2
    found, x0_error, eps_error = losses(path, prediction, kind="eps")
    same(found, eps_error)
    same(losses(path, prediction, kind="x")[0], x0_error)
    same(losses(path, prediction, kind="min_snr", gamma=5.0)[0], snr.clamp(max=5) * x0_error)
    sigma, sd = c.b / c.a, 0.5
    if isinstance(path, VE | EDM):
        same(losses(path, prediction, kind="edm")[0], (sigma**2 + sd**2) / (sigma * sd) ** 2 * x0_error)
    log_snr_rate = 2 * (c.da / c.a - c.db / c.b)
    density = TimestepConfig(mean=0.3).density(T, path)
    elbo = losses(path, prediction, TimestepConfig(mean=0.3), kind="elbo")[0]
    same(elbo, -log_snr_rate / 2 * eps_error / density)


def test_the_elbo_of_a_discrete_path_counts_by_the_middle_of_a_steps_draws() -> None:
    """At its end, t = 1 of the last step, a logit-normal's density is 0."""
    timesteps, path = TimestepConfig(std=2.0), DDPM()
    flow = FlowConfig(path=path, prediction="v", timesteps=timesteps, weight=WeightConfig(kind="elbo"))
    last = torch.ones(1)
    weight = flow.example(torch.zeros(1, 2), torch.zeros(1, 2), last).weight_B
    c, density = path.at(last), timesteps.density(torch.tensor([0.9995], dtype=torch.float64), path)
    torch.testing.assert_close(weight, (c.a * (c.a * c.db - c.b * c.da) / c.b / density).float())
    assert torch.isfinite(weight).all()


def test_sd3s_weight_is_the_plain_velocity_loss() -> None:
    """SD3, §2 and 3.1: L = −½·E_t[w_t·λ'_t·‖ε̂ − ε‖²] over uniform t, with w_t = t/(1 − t) and λ' = −2/(t·(1 − t))."""
    plain, _, eps_error = losses(Linear(), "velocity")
    same(plain, T / (1 - T) * eps_error / (T * (1 - T)))
    same(losses(Linear(), "eps", kind="velocity")[0], plain * 0 + losses(Linear(), "eps")[0] / (1 - T) ** 2)


def test_the_elbo_is_the_same_whatever_times_are_drawn() -> None:
    """Over t its expectation is that of a uniform t with the weight −½·dλ/dt."""
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ones = torch.ones(n, 1, dtype=torch.float64)
    found = []
    for timesteps in (TimestepConfig(kind="uniform"), TimestepConfig(std=2.0), TimestepConfig(kind="cosmap")):
        flow = FlowConfig(path=VP(), prediction="eps", timesteps=timesteps, weight=WeightConfig(kind="elbo"))
        t = timesteps.sample(u, VP()).clamp(1e-3, 1)
        c = VP().at(t)
        share = (c.b**2)[:, None] * ones  # an error that vanishes with the noise, so that the integral is finite
        example = flow.example(ones, ones, t)
        found.append(float(flow.loss_B(example.target + share, example).mean()))
    assert found[1] == pytest.approx(found[0], rel=5e-3)
    assert found[2] == pytest.approx(found[0], rel=5e-3)


@pytest.mark.parametrize("path", [VE(), EDM()], ids=str)
def test_an_exploding_input_is_scaled_to_variance_one(path: Path) -> None:
    flow = FlowConfig(path=path, prediction="edm", sigma_data=0.5)
    draws = NoisePlan(0).at(0, range(2000))
    x0, eps = 0.5 * draws.normal("x", (8,)), draws.normal("eps", (8,))
    for t in (0.0, 0.5, 1.0):
        t_B = torch.full((2000,), t)
        scaled = path.noised(x0, eps, t_B) * flow.input_scale(t_B, x0)
        assert float(scaled.std()) == pytest.approx(1, abs=0.03)
        assert float(flow.example(x0, eps, t_B).target.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("path", [VE(), EDM()], ids=str)
def test_an_exploding_velocity_is_said_over_its_rate(path: Path) -> None:
    """b' goes through five orders of magnitude, which no network's output does."""
    flow = FlowConfig(path=path, prediction="velocity")
    example = flow.example(X0, EPS, T)
    torch.testing.assert_close(example.target, EPS)
    said = flow.predictor(lambda x, t: example.target)(example.x_t, T)
    torch.testing.assert_close(said, path.at(T).like(X0).db * EPS)


def test_grids_stay_where_the_network_says_both() -> None:
    assert FlowConfig().span == (0, 1)
    assert FlowConfig(prediction="eps").span == pytest.approx((0, 50 / 51))
    assert FlowConfig(path=DDPM(), prediction="eps").span == DDPM().span
    assert FlowConfig(prediction="x").span == (0.001, 1)
    assert FlowConfig(prediction="score").span == pytest.approx((0.001, 50 / 51))
    assert FlowConfig(path=VP(), prediction="x").span == VP().span
    grid = FlowConfig(path=DDPM()).grid(10, shift=2.0)
    assert (grid[0], grid[-1]) == (1, 0.001)
    assert (grid.diff() < 0).all()


def test_times_stay_in_the_span_where_weights_are_finite() -> None:
    weight = WeightConfig(kind="velocity")
    flow = FlowConfig(prediction="x", timesteps=TimestepConfig(kind="log_normal", std=30.0), weight=weight)
    t = flow.times(NoisePlan(0).at(0, range(256)), 256)
    assert (t.min(), t.max()) == (torch.tensor(1e-3), 1)
    example = flow.example(torch.zeros(256, 2), torch.zeros(256, 2), t)
    assert torch.isfinite(example.weight_B).all()


def test_a_discrete_path_is_trained_at_its_steps() -> None:
    t = FlowConfig(path=DDPM(steps=100)).times(NoisePlan(0).at(0, range(64)), 64)
    torch.testing.assert_close(t * 100, (t * 100).round(), rtol=0, atol=1e-4)
    assert 0 < t.min() < t.max() <= 1


@pytest.mark.parametrize("path", [Linear(), VP(), Cosine(), DDPM(), EDM()], ids=str)
def test_validation_of_the_bound_is_over_even_times(path: Path) -> None:
    """Times drawn seldom weigh much in training; over a logit-normal's density they would be all of it, at 1e10."""
    flow = FlowConfig(path=path, prediction="v", weight=WeightConfig(kind="elbo"))
    example = flow.validation_example(torch.zeros(8, 2), torch.zeros(8, 2), range(8))
    torch.testing.assert_close(example.t_B, flow.validation_times(range(8)))
    even = flow.model_copy(update={"timesteps": TimestepConfig(kind="uniform")})
    expected = even.example(torch.zeros(8, 2), torch.zeros(8, 2), example.t_B).weight_B
    torch.testing.assert_close(example.weight_B, expected)
    assert torch.isfinite(example.weight_B).all()
    assert FlowConfig(weight=WeightConfig(kind="elbo")).span == (0.001, 1)
