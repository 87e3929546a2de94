"""Guidance of exact networks against closed forms; each rule against its identities and diffusers' functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from stack.config import UserError
from stack.flow import solvers
from stack.flow.guidance import (
    ApgConfig,
    Branches,
    CfgZeroConfig,
    GuidanceConfig,
    Guided,
    branches,
    classifier_gradient,
    optimal_scale,
    parallel,
    rescaled,
)
from stack.flow.path import EDM, VP, Linear, Path
from stack.flow.prediction import Prediction, convert
from stack.flow.process import FlowConfig, NetworkFn
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.conditioning import Context

Mixture = Any  # of conftest


def normal(like: Mixture, mean: list[float], variance: float) -> Mixture:
    weights, means, variances = (torch.tensor(v, dtype=torch.float64) for v in ([1.0], [mean], [variance]))
    return replace(like, weights=weights, means=means, variances=variances)


def component(mixture: Mixture, which: int) -> Mixture:
    return normal(mixture, mixture.means[which].tolist(), float(mixture.variances[which]))


@pytest.fixture(scope="module")
def data(gaussian: Mixture) -> Mixture:
    return normal(gaussian, [0.0, 0.5], 1.0)


@pytest.fixture(scope="module")
def given(gaussian: Mixture) -> Mixture:
    return normal(gaussian, [1.0, -0.5], 0.25)


FLOWS = {
    "linear": FlowConfig(),
    "vp": FlowConfig(path=VP(), prediction="eps"),
    "edm": FlowConfig(path=EDM(), prediction="edm"),
}


def predicted(flow: FlowConfig, of: Mixture) -> NetworkFn:
    return flow.predictor(of.network(flow))


def exact(flow: FlowConfig, data: Mixture, given: Mixture) -> Branches:
    without, under = predicted(flow, data), predicted(flow, given)
    return Branches(under, lambda x, t_B: (without(x, t_B), under(x, t_B)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(cond: Tensor, uncond: Tensor) -> Branches:
    """A network that says this, whatever it sees."""
    return Branches(lambda x, t_B: cond, lambda x, t_B: (uncond, cond))


# ---- closed forms


def reached(flow: FlowConfig, data: Mixture, given: Mixture, x: Tensor, times: Tensor, gamma: float) -> Tensor:
    """Where the guided ODE takes x.

    With z = x/a and τ = (b/a)² it is dz/dτ = ½·[γ·(z − μ)/(s² + τ) + (1 − γ)·(z − m)/(S² + τ)], solved by
    φ = (s² + τ)^(γ/2)·(S² + τ)^((1 − γ)/2) and variation of the constant.
    """
    parts = [(power, p.means[0], p.variances[0]) for power, p in ((gamma, given), (1 - gamma, data))]
    first, last = (flow.path.at(t) for t in times[[0, -1]])
    log_phi = sum(power / 2 * (variance + (last.b / last.a) ** 2).log() for power, _, variance in parts)
    log_phi_over_sigma = sum(
        power / 2 * torch.log1p(variance * (first.a / first.b) ** 2) for power, _, variance in parts
    )
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(400))
    low, high = (c.b / (c.a + c.b) for c in (last, first))
    u = low + (high - low) * (nodes + 1) / 2
    sigma = u / (1 - u)
    rate = sum(power / 2 * mean / (variance + sigma[:, None] ** 2) for power, mean, variance in parts)
    phi = torch.exp(sum(power / 2 * (variance + sigma**2).log() for power, _, variance in parts))
    measure = weights * (high - low) / 2 * 2 * sigma / (1 - u) ** 2
    integral = (rate * (measure / phi)[:, None]).sum(0)
    return last.a * log_phi.exp() * (x / first.b * torch.exp(-log_phi_over_sigma) + integral)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("gamma", [-0.5, 0.0, 1.0, 3.0])
def test_sampling_follows_the_closed_form(data: Mixture, given: Mixture, name: str, gamma: float) -> None:
    flow = FLOWS[name]
    guided = Guided(GuidanceConfig(scale=gamma), flow, exact(flow, data, given))
    times = flow.grid(1)
    x = flow.start(drawn(5, 2), float(times[0]))
    found = solvers.dopri5(flow.velocity_fn(guided), x, times, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found, reached(flow, data, given, x, times, gamma), rtol=0, atol=1e-5)


def test_what_is_reached_is_not_the_tilted_density(gaussian: Mixture) -> None:
    """The figures of the module's text. The ODE is linear, so two points give mean and deviation."""
    data, given, flow = normal(gaussian, [0.0], 1.0), normal(gaussian, [1.0], 0.25), FlowConfig()
    guided = Guided(GuidanceConfig(scale=3), flow, exact(flow, data, given))
    noise = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, above = solvers.dopri5(guided, noise, flow.grid(1), rtol=1e-7, atol=1e-7)[:, 0]
    assert float(mean) == pytest.approx(1.5, abs=1e-5)
    assert float((above - mean) ** 2) == pytest.approx(1 / 64, rel=1e-5)  # (s^γ·S^(1 − γ))²
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)[:, None]
    density = torch.exp(3 * given.log_density(x) - 2 * data.log_density(x))  # p(x)·p(y|x)³, up to a factor
    density = density / density.sum()
    tilted_mean = (density * x[:, 0]).sum()
    assert float(tilted_mean) == pytest.approx(1.2, abs=1e-6)
    assert float((density * (x[:, 0] - tilted_mean) ** 2).sum()) == pytest.approx(0.1, abs=1e-6)


def posterior(flow: FlowConfig, mixture: Mixture) -> Callable[[Tensor, Tensor], Tensor]:
    """The true ln p(component | x_t)."""

    def log_p(x: Tensor, t_B: Tensor) -> Tensor:
        return mixture._log_parts(x, flow.path.at(t_B).like(x)).log_softmax(1)

    return log_p


@pytest.mark.parametrize("path", [Linear(), VP(), EDM(sigma_max=20)], ids=lambda path: path.kind)
@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("gamma", [0.5, 4.0])
def test_a_classifier_guides_as_the_condition_does(
    mixture: Mixture, path: Path, prediction: Prediction, gamma: float
) -> None:
    flow = FlowConfig(path=path, prediction=prediction)
    x, t_B = drawn(4, 2), torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    gradient = classifier_gradient(posterior(flow, mixture), torch.zeros(4, dtype=torch.long))
    by_classifier = Guided(
        GuidanceConfig(classifier=gamma), flow, Branches(predicted(flow, mixture)), gradient=gradient
    )
    by_condition = Guided(GuidanceConfig(scale=gamma), flow, exact(flow, mixture, component(mixture, 0)))
    torch.testing.assert_close(by_classifier(x, t_B), by_condition(x, t_B), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("gamma", [-0.5, 1.0, 2.5])
def test_classifier_guidance_follows_the_closed_form(data: Mixture, given: Mixture, name: str, gamma: float) -> None:
    flow = FLOWS[name]

    def log_p(x: Tensor, t_B: Tensor) -> Tensor:  # of a condition without classes: its density, up to a constant
        c = flow.path.at(t_B).like(x)
        return (given.log_density(x, c) - data.log_density(x, c))[:, None]

    gradient = classifier_gradient(log_p, torch.zeros(5, dtype=torch.long))
    guided = Guided(GuidanceConfig(classifier=gamma), flow, Branches(predicted(flow, data)), gradient=gradient)
    times = flow.grid(1).clamp(max=0.95)  # there is nothing to classify at t = 1 of the linear path
    with torch.inference_mode():
        x = flow.start(drawn(5, 2), float(times[0]))
        found = solvers.dopri5(flow.velocity_fn(guided), x, times, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found, reached(flow, data, given, x, times, gamma), rtol=0, atol=1e-5)


# ---- what holds of every rule

RULES = {
    "scale": GuidanceConfig(scale=3),
    "interval": GuidanceConfig(scale=3, interval=(0.25, 0.8)),
    "rescale": GuidanceConfig(scale=3, rescale=0.7),
    "apg": GuidanceConfig(scale=3, apg=ApgConfig(eta=0.3, norm_threshold=0.4)),
    "momentum": GuidanceConfig(scale=3, apg=ApgConfig(momentum=-0.5), interval=(0.1, 0.85)),
    "cfg_zero": GuidanceConfig(scale=3, cfg_zero=CfgZeroConfig(zero_above=0.85)),
    "autoguidance": GuidanceConfig(autoguidance=2),
    "classifier": GuidanceConfig(classifier=1.5),
    "all": GuidanceConfig(
        scale=2, autoguidance=1.5, classifier=0.5, rescale=0.5, apg=ApgConfig(eta=0.5, momentum=-0.3),
        interval=(0.25, 0.8),
    ),
}  # fmt: skip


def of_rule(rule: str, flow: FlowConfig, mixture: Mixture) -> Guided:
    def gradient(x: Tensor, t_B: Tensor) -> Tensor:
        return classifier_gradient(posterior(flow, mixture), torch.ones(len(x), dtype=torch.long))(x, t_B)

    both = exact(flow, mixture, component(mixture, 0))
    return Guided(RULES[rule], flow, both, weak=predicted(flow, normal(mixture, [0.0, 0.5], 1.0)), gradient=gradient)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", [Linear(), VP(), EDM(sigma_max=20)], ids=lambda path: path.kind)
def test_a_rule_says_the_same_whatever_is_predicted(mixture: Mixture, rule: str, path: Path) -> None:
    flows = [FlowConfig(path=path, prediction=prediction) for prediction in get_args(Prediction)]
    guided = [flow.velocity_fn(of_rule(rule, flow, mixture)) for flow in flows]
    plain = flows[0].velocity_fn(predicted(flows[0], component(mixture, 0)))
    changed = False
    for t in (0.9, 0.8, 0.5, 0.3, 0.1):
        x, t_B = drawn(4, 2, seed=int(10 * t)), torch.full((4,), t, dtype=torch.float64)
        expected, *others = (each(x, t_B) for each in guided)
        changed |= bool((expected - plain(x, t_B)).abs().max() > 1e-3)
        for found in others:
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert changed


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_does_not_depend_on_its_batch(mixture: Mixture, rule: str) -> None:
    flow = FlowConfig()
    times = torch.tensor([[0.9, 0.7, 0.5], [0.6, 0.65, 0.2], [0.3, 0.1, 0.15], [0.3, 0.4, 0.1]], dtype=torch.float64)
    together, alone = of_rule(rule, flow, mixture), [of_rule(rule, flow, mixture) for _ in range(3)]
    for step, t_B in enumerate(times):
        x = drawn(3, 2, seed=step)
        expected = torch.cat([one(x[i : i + 1], t_B[i : i + 1]) for i, one in enumerate(alone)])
        torch.testing.assert_close(together(x, t_B), expected, rtol=1e-12, atol=1e-12)


def test_nor_does_one_of_an_adaptive_solver(mixture: Mixture) -> None:
    """Whose samples stand at times of their own, in and out of the interval."""
    flow, x = FlowConfig(), drawn(4, 2)
    samples = [solvers.dopri5(of_rule("interval", flow, mixture), part, flow.grid(1)) for part in (x, x[:1], x[3:])]
    torch.testing.assert_close(samples[0][[0, 3]], torch.cat(samples[1:]), rtol=1e-9, atol=1e-9)


# ---- one call of the network


def mmdit() -> MMDiT:
    model = MMDiT(MMDiTConfig.from_preset("mmdit-test")).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.requires_grad_(False)


def captions(lengths: list[int], seed: int) -> Context:
    return Context(drawn(sum(lengths), 32, seed=seed), lengths, drawn(len(lengths), 32, seed=seed + 1))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 3, 2]])
def test_both_halves_of_a_text_model_in_one_call_or_two(lengths: list[int]) -> None:
    model, flow = mmdit(), FlowConfig()
    calls = []

    def network(x: Tensor, t_B: Tensor, context: Context) -> Tensor:
        calls.append(len(x))
        return model(x, t_B, *context)

    latent, t_B = drawn(3, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    cond, uncond = captions(lengths, 2), captions([5, 5, 5], 4)
    one = branches(flow, network, cond, uncond, Context.cat)
    found = [Guided(GuidanceConfig(scale=scale), flow, one)(latent, t_B) for scale in (1.0, 4.0)]
    assert calls == [3, 6]
    v_cond, v_uncond = (model(latent, t_B, *context) for context in (cond, uncond))
    torch.testing.assert_close(found[0], v_cond, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], v_uncond + 4 * (v_cond - v_uncond), rtol=1e-9, atol=1e-9)
    two = branches(flow, network, cond, uncond, Context.cat, batched=False)
    in_two = Guided(GuidanceConfig(scale=4.0), flow, two)(latent, t_B)
    assert calls[2:] == [3, 3]
    torch.testing.assert_close(in_two, found[1], rtol=1e-9, atol=1e-9)


def test_a_step_is_one_call_and_a_single_batch_outside_of_the_interval(mixture: Mixture) -> None:
    flow, calls = FlowConfig(path=EDM(), prediction="edm"), []
    networks = [component(mixture, 0).network(flow), component(mixture, 1).network(flow), mixture.network(flow)]

    def network(x: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        calls.append((len(x), round(float(t_B[0]), 2)))
        every = torch.stack([one(x, t_B) for one in networks])
        return every[label_B, torch.arange(len(x))]

    label_B, null_B = torch.tensor([0, 1, 1]), torch.full((3,), 2)
    guided = Guided(
        GuidanceConfig(scale=2, interval=(0.3, 0.7)), flow, branches(flow, network, label_B, null_B, torch.cat)
    )
    solvers.euler(flow.velocity_fn(guided), flow.start(drawn(3, 2), 1.0), flow.grid(10))
    assert calls == [(6 if 3 <= step <= 7 else 3, step / 10) for step in range(10, 0, -1)]
    x, t_B = drawn(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    expected = torch.cat(
        [
            Guided(GuidanceConfig(scale=2), flow, exact(flow, mixture, component(mixture, int(label))))(x, t_B)[i][None]
            for i, label in enumerate(label_B)
        ]
    )
    torch.testing.assert_close(guided(x, t_B), expected, rtol=1e-9, atol=1e-9)


# ---- each rule

X, COND, UNCOND, WEAK = drawn(4, 3, 2, 5)
T_B = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)


def test_interval_ends_belong_to_it_in_single_precision_too() -> None:
    guided = Guided(GuidanceConfig(scale=2, interval=(0.1, 0.7)), FlowConfig(), said(COND, UNCOND))
    inside = 2 * COND - UNCOND
    for t, expected in ((0.7, inside), (0.1, inside), (0.71, COND), (0.09, COND)):
        for dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(guided(X, torch.full((3,), t, dtype=dtype)), expected)


def test_autoguidance() -> None:
    flow = FlowConfig()

    def guided(network: Branches, weak: Tensor, **scales: Any) -> Tensor:
        return Guided(GuidanceConfig(**scales), flow, network, weak=lambda x, t_B: weak)(X, T_B)

    only = Branches(lambda x, t_B: COND)  # never asked for what it says without the condition
    torch.testing.assert_close(guided(only, WEAK, autoguidance=2.5), WEAK + 2.5 * (COND - WEAK))
    torch.testing.assert_close(guided(only, WEAK, autoguidance=0.0), WEAK)
    torch.testing.assert_close(guided(only, COND, autoguidance=2.5), COND)
    assert torch.equal(guided(only, WEAK, autoguidance=1.0), COND)
    cfg = UNCOND + 3 * (COND - UNCOND)
    both = said(COND, UNCOND)
    torch.testing.assert_close(guided(both, UNCOND, autoguidance=3.0), cfg)  # the unconditional network as the weak one
    torch.testing.assert_close(guided(both, COND, scale=3.0, autoguidance=2.5), cfg)
    torch.testing.assert_close(guided(both, WEAK, scale=3.0, autoguidance=2.5), cfg + 1.5 * (COND - WEAK))


def test_rescale_gives_the_conditional_deviation() -> None:
    cfg = UNCOND + 5 * (COND - UNCOND)
    found = Guided(GuidanceConfig(scale=5, rescale=1.0), FlowConfig(), said(COND, UNCOND))(X, T_B)
    torch.testing.assert_close(found.flatten(1).std(1), COND.flatten(1).std(1))
    for phi in (0.0, 0.3, 1.0):
        torch.testing.assert_close(rescaled(cfg, COND, phi), rescale_noise_cfg(cfg, COND, phi))
    # On a variance-preserving path the velocity is θ'·v, θ = arctan(b/a): the paper's network gets the paper's rule.
    flow = FlowConfig(path=VP(), prediction="v")
    found = Guided(GuidanceConfig(scale=5, rescale=0.7), flow, said(COND, UNCOND))(X, T_B)
    torch.testing.assert_close(found, rescale_noise_cfg(cfg, COND, 0.7))


@pytest.mark.parametrize(("eta", "threshold", "beta"), [*product((0.0, 1.0, 0.4), (None, 2.0), (0.0, -0.5))])
def test_apg_is_the_papers_over_a_sampling(eta: float, threshold: float | None, beta: float) -> None:
    steps = [(t, drawn(3, 2, 5, seed=seed), drawn(3, 2, 5, seed=seed + 9)) for seed, t in enumerate((0.9, 0.5, 0.3))]
    now: list[Tensor] = []
    network = Branches(lambda x, t_B: now[1], lambda x, t_B: (now[0], now[1]))
    config = GuidanceConfig(scale=4, apg=ApgConfig(eta=eta, norm_threshold=threshold, momentum=beta))
    guided, buffer = Guided(config, FlowConfig(prediction="x"), network), MomentumBuffer(beta)
    for t, *now[:] in steps:
        uncond, cond = now
        expected = normalized_guidance(cond, uncond, 3.0, buffer, eta, threshold or 0, use_original_formulation=True)
        torch.testing.assert_close(guided(X, torch.full((3,), t)), expected)


def test_apg_takes_a_difference_apart() -> None:
    along = parallel(COND - UNCOND, COND)
    across = COND - UNCOND - along
    zero_B = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close((across * COND).flatten(1).sum(1), zero_B, atol=1e-12, rtol=0)
    torch.testing.assert_close(parallel(along, COND), along)
    torch.testing.assert_close(parallel(across, COND), across * 0, atol=1e-12, rtol=0)
    flow = FlowConfig()

    def apg(**keys: float) -> Tensor:
        config = GuidanceConfig(scale=3, apg=ApgConfig(**keys))
        return Guided(config, flow, said(COND, UNCOND))(X, T_B)

    cfg = Guided(GuidanceConfig(scale=3), flow, said(COND, UNCOND))(X, T_B)
    torch.testing.assert_close(apg(eta=1.0), cfg)
    torch.testing.assert_close(apg(eta=0.5), (apg(eta=0.0) + apg(eta=1.0)) / 2)
    data = convert("velocity", "x", flow.path, COND, X, T_B)
    t = T_B.view(3, 1, 1)
    removed = -t * (cfg - apg(eta=0.0))  # of the data: −t of the velocity's
    torch.testing.assert_close(removed, parallel(removed, data))
    shortened = -t * (apg(eta=1.0, norm_threshold=0.1) - COND) / 2
    torch.testing.assert_close(shortened.flatten(1).norm(dim=1), zero_B + 0.1)


def test_momentum_counts_times_and_not_calls() -> None:
    """A later stage at the same time takes the place of an earlier one, and a noisier time begins anew."""
    config = GuidanceConfig(scale=2, apg=ApgConfig(eta=1.0, momentum=-0.5))

    def last(*times: float) -> Tensor:
        now = [0.0]
        network = Branches(lambda x, t_B: COND, lambda x, t_B: (now[0] * UNCOND, COND))
        guided = Guided(config, FlowConfig(prediction="x"), network)
        for now[0] in times:
            found = guided(X, torch.full((3,), now[0]))
        return found

    torch.testing.assert_close(last(0.8, 0.6, 0.6, 0.6), last(0.8, 0.6))
    torch.testing.assert_close(last(0.8, 0.4, 0.6), last(0.6))
    assert not torch.allclose(last(0.8, 0.6), last(0.6))


def test_cfg_zero_fits_the_unconditional_velocity() -> None:
    s = optimal_scale(UNCOND, COND)

    def distance(scale: Tensor) -> Tensor:
        return (COND - scale * UNCOND).flatten(1).norm(dim=1)

    assert (distance(s) < distance(s + 0.01)).all()
    assert (distance(s) < distance(s - 0.01)).all()
    flat = [y.flatten(1) for y in (COND, UNCOND)]
    torch.testing.assert_close(s.flatten(), cfg_zero_star_scale(*flat).flatten(), rtol=1e-5, atol=1e-6)
    config = GuidanceConfig(scale=3, cfg_zero=CfgZeroConfig(zero_above=0.7))
    found = Guided(config, FlowConfig(), said(COND, UNCOND))(X, T_B)
    torch.testing.assert_close(found[:2], (s * UNCOND + 3 * (COND - s * UNCOND))[:2])
    assert torch.equal(found[2], torch.zeros_like(found[2]))
    multiple = Guided(config, FlowConfig(), said(COND, 0.3 * COND))(X, T_B)
    torch.testing.assert_close(multiple[:2], COND[:2])  # s* takes away what differs only in length


def test_cfg_zero_leaves_out_the_first_step_of_euler(data: Mixture, given: Mixture) -> None:
    config = GuidanceConfig(scale=3, cfg_zero=CfgZeroConfig())
    flow, noise = FlowConfig(), drawn(3, 2)
    guided = Guided(config, flow, exact(flow, data, given))
    times = flow.grid(20)
    torch.testing.assert_close(solvers.euler(guided, noise, times), solvers.euler(guided, noise, times[1:]))
    assert not torch.allclose(solvers.euler(guided, noise, times[1:]), solvers.euler(guided, noise, times[2:]))


# ---- mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"apg": {}, "cfg_zero": {}}, "exclude each other"),
        ({"interval": (0.8, 0.2)}, "must rise"),
        ({"interval": (0.0, 1.5)}, "within 0"),
        ({"interval": (0.0, 0.9), "cfg_zero": {}}, "zero_above 0.99 lies outside"),
        ({"apg": {"momentum": -1.0}}, "greater than -1"),
        ({"rescale": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_combinations_say_why(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceConfig.model_validate(keys)


def test_a_scale_needs_what_it_scales() -> None:
    alone = Branches(lambda x, t_B: COND)
    for key, thing in (("scale", "without the condition"), ("autoguidance", "weaker"), ("classifier", "a classifier")):
        with pytest.raises(UserError, match=rf"guidance\.{key} 2\.0 needs .*{thing}"):
            Guided(GuidanceConfig(**{key: 2.0}), FlowConfig(), alone)


def test_ends_of_the_path_at_which_there_is_no_answer() -> None:
    flow, first, last = FlowConfig(), torch.zeros(3), torch.ones(3)
    gradient = classifier_gradient(lambda x, t_B: x.flatten(1).log_softmax(1), torch.tensor([0, 1, 2]))
    keys = {"classifier": 2.0, "scale": 2.0, "apg": {"momentum": -0.5}}
    guided = Guided(GuidanceConfig.model_validate(keys), flow, said(COND, UNCOND), gradient=gradient)
    with pytest.raises(UserError, match="classifier has nothing to look at"):
        guided(X, last)
    with pytest.raises(UserError, match="momentum moves data"):
        guided(X, first)
    keys["interval"] = (0.01, 0.99)
    guided = Guided(GuidanceConfig.model_validate(keys), flow, said(COND, UNCOND), gradient=gradient)
    assert torch.equal(guided(X, first), COND)
    assert torch.equal(guided(X, last), COND)
    assert guided(X, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).isfinite().all()


def test_every_rule_but_momentum_and_classifiers_reaches_both_ends() -> None:
    for config in (RULES["scale"], RULES["rescale"], RULES["apg"], RULES["autoguidance"]):
        guided = Guided(config, FlowConfig(), said(COND, UNCOND), weak=lambda x, t_B: WEAK)
        for end in (torch.zeros(3), torch.ones(3)):
            assert guided(X, end).isfinite().all()
