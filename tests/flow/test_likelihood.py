"""Likelihoods of optimal networks against the densities and entropies of the data that they are optimal for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from stack.flow.likelihood import (
    Bits,
    LikelihoodConfig,
    bits_per_dim,
    ddpm_bound,
    decode,
    dequantized,
    discretized_log_prob,
    encode,
    log_density,
    slerp,
)
from stack.flow.noise import Draws, NoisePlan
from stack.flow.path import DDPM, EDM, VE, VP, Conical, Cosine, Linear, Path, SubVP
from stack.flow.prediction import Prediction
from stack.flow.process import FlowConfig
from stack.flow.solvers import VelocityFn, dopri5, rk4

FLOWS: list[tuple[Path, Prediction, int]] = [  # and how many steps of rk4 it takes
    (Linear(), "velocity", 50),
    (Linear(), "eps", 50),
    (Conical(sigma_min=0.01), "x", 50),
    (VP(), "eps", 120),
    (SubVP(), "score", 100),
    (Cosine(), "v", 75),
    (VE(), "score", 150),
    (EDM(), "edm", 150),
]
EULER = 0.5772156649
NAMES = [f"{path.kind}/{prediction}" for path, prediction, _ in FLOWS]


def of_dims(mixture, num_dims: int):
    """The mixture with its two coordinates repeated."""
    return replace(mixture, means=mixture.means.repeat(1, 3)[:, :num_dims] / num_dims**0.5)


def velocity_of(flow: FlowConfig, data) -> VelocityFn:
    return flow.velocity_fn(flow.predictor(data.network(flow)))


def normal_log_density(x: Tensor, std: Tensor) -> Tensor:
    return Normal(torch.zeros_like(x), std).log_prob(x).sum(1)


def levels_of(count: int) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64)


def binned(data: Normal, count: int) -> Tensor:
    """Probabilities of the levels of a normal variable that is rounded to them."""
    edges = (levels_of(count)[1:] + levels_of(count)[:-1]) / 2
    return torch.cat([torch.zeros(1), data.cdf(edges), torch.ones(1)]).diff()


@pytest.mark.parametrize(("kind", "num_dims"), [("gaussian", 2), ("mixture", 1), ("mixture", 2), ("mixture", 5)])
@pytest.mark.parametrize(("path", "prediction", "steps"), FLOWS, ids=NAMES)
def test_the_density_is_the_true_one(path, prediction, steps, kind, num_dims, request) -> None:
    data = of_dims(request.getfixturevalue(kind), num_dims)
    flow = FlowConfig(path=path, prediction=prediction, sigma_data=0.7)
    times = flow.grid(steps)
    x0 = data.draw(16)
    found = log_density(velocity_of(flow, data), path, x0, times, solve=rk4)
    near, far = (path.at(t.expand(16)).like(x0) for t in (times[-1], times[0]))
    expected = data.log_density(near.a * x0, near) + num_dims * near.a[:, 0].log()
    neglected = normal_log_density(far.b * found.noise, far.b) - data.log_density(far.b * found.noise, far)
    torch.testing.assert_close(found.value_B, expected + neglected, atol=1e-5, rtol=0)
    assert not found.std_error_B.any()
    if path.kind == "linear" and prediction == "velocity":
        torch.testing.assert_close(found.value_B, data.log_density(x0), atol=1e-5, rtol=0)


def test_where_noise_is_left_the_density_is_that_of_data_with_as_much_noise(mixture) -> None:
    flow = FlowConfig(path=VP(), prediction="eps")
    times = torch.linspace(1, 0.05, 51, dtype=torch.float64)
    x0, c = mixture.draw(16), VP().at(times[-1])
    blurred = replace(mixture, variances=mixture.variances + (c.b / c.a) ** 2)
    found = log_density(velocity_of(flow, mixture), flow.path, x0, times, solve=rk4)
    torch.testing.assert_close(found.value_B, blurred.log_density(x0), atol=0.02, rtol=0)  # of data left at 1
    assert (found.value_B - mixture.log_density(x0)).abs().max() > 0.1


def test_what_is_neglected_costs_no_more_than_its_bound(gaussian) -> None:
    path = VE(sigma_max=5.0)
    flow = FlowConfig(path=path, prediction="score")
    x0 = gaussian.draw(4000)
    found = log_density(velocity_of(flow, gaussian), path, x0, flow.grid(40), solve=rk4).value_B
    c = path.at(torch.zeros(len(x0))).like(x0)
    cost = float((gaussian.log_density(x0, c) - found).mean())
    assert 0 < cost < float(x0.square().sum(1).mean()) / (2 * 5.0**2)


def test_an_image_is_as_likely_as_its_elements_in_a_row(mixture) -> None:
    flow = FlowConfig()
    velocity_fn = velocity_of(flow, mixture)
    x0 = mixture.draw(8)
    rows = log_density(velocity_fn, flow.path, x0, flow.grid(20))
    images = log_density(
        lambda x, t: velocity_fn(x.flatten(1), t).reshape(x.shape), flow.path, x0.reshape(8, 2, 1, 1), flow.grid(20)
    )
    torch.testing.assert_close(images.value_B, rows.value_B)
    assert images.noise.shape == (8, 2, 1, 1)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_hutchinsons_trace_is_unbiased(trace: str, mixture) -> None:
    data, flow = of_dims(mixture, 5), FlowConfig()
    x0 = data.draw(32)
    exact = log_density(velocity_of(flow, data), flow.path, x0, flow.grid(20))
    probe = LikelihoodConfig(trace=trace, probes=100).probe(NoisePlan(0).at(0, range(32)), x0, "test")
    found = log_density(velocity_of(flow, data), flow.path, x0, flow.grid(20), probe)
    torch.testing.assert_close(found.noise, exact.noise)
    error_B = found.value_B - exact.value_B
    assert abs(error_B.sum()) < 3 * found.std_error_B.square().sum().sqrt()
    assert 0.5 < (error_B / found.std_error_B).square().mean() < 1.6  # of 32 squares of about a t distribution
    alone = log_density(velocity_of(flow, data), flow.path, x0, flow.grid(20), probe[:1])
    assert alone.std_error_B.isnan().all()


def test_standard_errors_of_a_jacobian_that_is_a_multiple_of_one(gaussian) -> None:
    """Rademacher's probes say its trace exactly, Gaussian ones with variance 2·D·(ln(std of noise/std of data))²."""
    data, flow = of_dims(gaussian, 5), FlowConfig()
    x0, draws = data.draw(64), NoisePlan(0).at(0, range(64))
    errors = {}
    for trace in ("rademacher", "gaussian"):
        probe = LikelihoodConfig(trace=trace, probes=50).probe(draws, x0, "test")
        errors[trace] = log_density(velocity_of(flow, data), flow.path, x0, flow.grid(30), probe).std_error_B
    assert errors["rademacher"].max() < 1e-9
    expected = math.sqrt(2 * 5 / 50) * abs(math.log(math.sqrt(0.3)))
    assert float(errors["gaussian"].square().mean().sqrt()) == pytest.approx(expected, rel=0.05)


def test_each_sample_takes_dopri5s_steps_by_itself(mixture) -> None:
    def solve(velocity_fn: VelocityFn, x: Tensor, times: Tensor) -> Tensor:
        return dopri5(velocity_fn, x, times, rtol=1e-7, atol=1e-7)

    flow, x0 = FlowConfig(), mixture.draw(6)
    found = log_density(velocity_of(flow, mixture), flow.path, x0, flow.grid(1), solve=solve)
    torch.testing.assert_close(found.value_B, mixture.log_density(x0), atol=1e-5, rtol=0)
    alone = log_density(velocity_of(flow, mixture), flow.path, x0[2:3], flow.grid(1), solve=solve)
    torch.testing.assert_close(alone.value_B, found.value_B[2:3], atol=1e-12, rtol=0)


def bits(data, x0: Tensor, draws: Draws, steps: int = 20, **config):
    flow = FlowConfig()
    return bits_per_dim(
        velocity_of(flow, data), flow.path, x0, flow.grid(steps), draws, LikelihoodConfig(**config), solve=rk4
    )


@pytest.mark.parametrize("trace", ["exact", "rademacher", "gaussian"])
def test_bits_belong_to_seed_and_number(trace: str, mixture) -> None:
    x0 = dequantized(mixture.draw(5), 17, torch.full((5, 2), 0.5))
    config = {"levels": 17, "dequantizations": 2, "trace": trace, "probes": 3}
    together = bits(mixture, x0, NoisePlan(1).at(7, range(5)), **config)
    for found, expected in zip(bits(mixture, x0[[3, 1]], NoisePlan(1).at(7, [3, 1]), **config), together, strict=True):
        torch.testing.assert_close(found, expected[[3, 1]], atol=1e-12, rtol=0)
    for other in (NoisePlan(2).at(7, range(5)), NoisePlan(1).at(8, range(5))):
        assert (bits(mixture, x0, other, **config).value_B != together.value_B).all()


def test_more_draws_make_the_error_smaller(mixture) -> None:
    x0, draws = mixture.draw(64), NoisePlan(0).at(0, range(64))
    one, eight = (bits(mixture, x0, draws, trace="gaussian", probes=4, dequantizations=n).std_error_B for n in (1, 8))
    assert float((eight.square().mean() / one.square().mean()).sqrt()) == pytest.approx(8**-0.5, rel=0.2)


def test_bits_are_the_density_in_units_of_a_bin(mixture) -> None:
    x0, draws = mixture.draw(8), NoisePlan(0).at(0, range(8))
    found = bits(mixture, x0, draws, steps=100, levels=256, trace="exact")
    moved = dequantized(x0, 256, draws.uniform("dequantization0", (2,)))
    assert 0 < (moved - x0).abs().max() < 1 / 255
    expected = -(mixture.log_density(moved) + 2 * math.log(2 / 255)) / (2 * math.log(2))
    torch.testing.assert_close(found.value_B, expected, atol=1e-5, rtol=0)
    assert not found.std_error_B.any()


def test_bits_of_a_discretized_gaussian_are_its_entropy(gaussian) -> None:
    """Beyond it lies the spread of ln p within a bin: about Δ²/(24·s²) nats."""
    data = replace(gaussian, means=gaussian.means * 0, variances=gaussian.variances * 0 + 0.3**2)
    prob = binned(Normal(0.0, 0.3), 17)
    x0 = torch.cartesian_prod(levels_of(17), levels_of(17))
    weights = torch.cartesian_prod(prob, prob).prod(1)
    draws = NoisePlan(0).at(0, range(len(x0)))
    found = bits(data, x0, draws, levels=17, dequantizations=16, trace="exact")
    entropy = float(-(prob * prob.log2()).sum())
    gap = (2 / 16) ** 2 / (24 * 0.3**2) / math.log(2)
    assert float(weights @ found.value_B) - entropy == pytest.approx(gap, abs=0.005)


@pytest.mark.parametrize("std", [1e-3, 0.1, 30.0])
def test_the_decoders_bins_share_all_of_a_normal(std: float) -> None:
    x = levels_of(17)
    mean = torch.tensor([-2.0, -0.3, 0.06, 1.0], dtype=torch.float64)[:, None]
    found = discretized_log_prob(x, mean, torch.tensor(std, dtype=torch.float64), 17)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=torch.float64))
    assert found.isfinite().all()
    expected = torch.stack([binned(Normal(m, std), 17) for m in mean[:, 0]])
    torch.testing.assert_close(found.exp(), expected, atol=1e-12, rtol=1e-6)


def test_a_bin_far_from_the_mean_keeps_its_logarithm() -> None:
    found = discretized_log_prob(*torch.tensor([[-0.5], [0.5], [0.01]], dtype=torch.float64), levels=17)
    edge = (1 - 1 / 16) / 0.01
    assert float(found) == pytest.approx(-(edge**2) / 2 - math.log(edge * math.sqrt(2 * math.pi)), abs=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_is_the_log_ratio_of_chains(variance: str, gaussian) -> None:
    """DDPM's eq. 3, −E[ln p(x_T) + Σ ln p(x_{n−1}|x_n) − ln q(x_n|x_{n−1})], over chains drawn step by step, with the
    mean of p from the noise (eq. 11)."""
    path, count = DDPM(steps=6, beta_first=0.05, beta_last=0.4), 8000
    flow = FlowConfig(path=path, prediction="eps")
    network = gaussian.network(flow)
    x0 = torch.tensor([[0.5, -0.75]], dtype=torch.float64).expand(count, 2)

    beta = torch.linspace(0.05, 0.4, 6, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    small = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    std = torch.cat([small[:1], small if variance == "fixed_small" else beta[1:]]).sqrt()
    generator = torch.Generator().manual_seed(0)
    chain, ratio = [x0], torch.zeros(count, dtype=torch.float64)
    for n in range(6):
        step = Normal((1 - beta[n]).sqrt() * chain[-1], beta[n].sqrt())
        chain.append(step.mean + step.stddev * torch.randn(count, 2, generator=generator, dtype=torch.float64))
        ratio += step.log_prob(chain[-1]).sum(1)
    ratio -= Normal(0, 1).log_prob(chain[6]).sum(1)
    for n in range(6):
        eps = network(chain[n + 1], torch.full((count,), (n + 1) / 6, dtype=torch.float64))
        mean = (chain[n + 1] - beta[n] / (1 - bar[n]).sqrt() * eps) / (1 - beta[n]).sqrt()
        if n > 0:
            ratio -= Normal(mean, std[n]).log_prob(chain[n]).sum(1)
        else:
            within = Normal(mean, std[0])
            ratio -= (within.cdf(x0 + 1 / 16) - within.cdf(x0 - 1 / 16)).log().sum(1)
    expected = ratio / (2 * math.log(2))

    estimate_fn = flow.estimate_fn(flow.predictor(network))
    draws = NoisePlan(0).at(0, range(count))
    whole = ddpm_bound(estimate_fn, path, x0, draws, levels=17, variance=variance)
    assert whole.std_error_B.isnan().all()
    noise = (whole.value_B.var() + expected.var()).sqrt() / count**0.5
    assert abs(float(whole.value_B.mean() - expected.mean())) < 3 * float(noise)
    some = ddpm_bound(estimate_fn, path, x0, draws, levels=17, variance=variance, terms=4)
    noise = (whole.value_B.var() + some.value_B.var()).sqrt() / count**0.5
    assert abs(float(some.value_B.mean() - whole.value_B.mean())) < 3 * float(noise)
    assert 0.3 < float(some.std_error_B.square().mean() / some.value_B.var()) < 1.1  # the decoder's term varies, too


def test_the_bound_lies_a_little_above_the_entropy(mixture) -> None:
    """Of data of independent elements, with the network that is optimal for them; the gap falls with the steps."""
    prob, copies = binned(Normal(0.0, 0.3), 5), 1000
    entropy = float(-(prob * prob.log2()).sum())
    data = replace(mixture, weights=prob, means=levels_of(5)[:, None], variances=torch.zeros_like(prob))
    x0 = levels_of(5)[:, None].expand(5, copies)

    def bound(steps: int, numbers: list[int] | range = range(5), **options) -> Bits:
        flow = FlowConfig(path=DDPM(steps=steps, beta_first=0.1 / steps, beta_last=20 / steps), prediction="eps")
        network = data.network(flow)

        def elementwise(x: Tensor, t_B: Tensor) -> Tensor:
            return network(x.reshape(-1, 1), t_B.repeat_interleave(copies)).reshape(x.shape)

        estimate_fn = flow.estimate_fn(flow.predictor(elementwise))
        return ddpm_bound(estimate_fn, flow.path, x0[numbers], NoisePlan(0).at(0, numbers), 5, **options)

    whole = float(prob @ bound(500).value_B)
    gaps = [float(prob @ bound(125).value_B) - entropy, whole - entropy]
    assert 0 < gaps[1] < 0.1
    assert 2.5 < gaps[0] / gaps[1] < 6
    assert float(prob @ bound(500, variance="fixed_large").value_B) > entropy + (1 - EULER) / (2 * math.log(2))

    some = bound(500, terms=100)
    assert abs(float(prob @ some.value_B) - whole) < 3 * float((prob**2 @ some.std_error_B**2).sqrt())
    alone = bound(500, [3, 1], terms=100)
    torch.testing.assert_close(alone.value_B, some.value_B[[3, 1]], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("path", "prediction", "steps"), FLOWS, ids=NAMES)
def test_data_are_the_noise_they_were_encoded_to(path, prediction, steps, mixture) -> None:
    flow = FlowConfig(path=path, prediction=prediction, sigma_data=0.7)
    velocity_fn, times, x0 = velocity_of(flow, mixture), flow.grid(steps), mixture.draw(16)
    noise = encode(velocity_fn, path, x0, times, rk4)
    torch.testing.assert_close(decode(velocity_fn, path, noise, times, rk4), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_density(velocity_fn, path, x0, times, solve=rk4).noise, noise)


def test_a_gaussians_noise_is_its_standard_score(gaussian) -> None:
    flow, x0 = FlowConfig(), gaussian.draw(8)
    noise = encode(velocity_of(flow, gaussian), flow.path, x0, flow.grid(100), rk4)
    torch.testing.assert_close(noise, (x0 - gaussian.means) / gaussian.variances.sqrt(), atol=1e-6, rtol=0)


def test_noise_between_noises() -> None:
    draws = NoisePlan(0).at(0, range(3))
    first, second = draws.normal("first", (4, 8, 8)), draws.normal("second", (4, 8, 8))
    found = slerp(first, second, torch.tensor([0.0, 0.3, 0.5, 1.0]))
    assert found.shape == (4, 3, 4, 8, 8)
    torch.testing.assert_close(found[0], first)
    torch.testing.assert_close(found[3], second)
    torch.testing.assert_close(found.flatten(2).std(2), torch.ones(4, 3), atol=0.15, rtol=0)
    torch.testing.assert_close(slerp(first, first, torch.tensor([0.4]))[0], first)

    unit, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(slerp(unit, other, torch.tensor([1 / 3]))[0], torch.tensor([[math.sqrt(0.75), 0.5]]))
