"""How likely data are under what is learnt: exactly along the probability-flow ODE, or by DDPM's variational bound;
and data as noise, which the same ODE gives.

The ODE carries the noise N(0, b(1)²) that sampling starts from to data, so the model has a density, and its change
along a trajectory is the divergence of the velocity: d ln p_t(x_t)/dt = −∇·v(x_t, t) (instantaneous change of
variables, FFJORD, arXiv 1810.01367, eq. 2; Score SDE, arXiv 2011.13456, eq. 39). It is the density of the samples
themselves. Two things part it from the density of the data, with an optimal network, too:

- Where a(1) ≠ 0 something of the data is left in the noise, which sampling neglects. On average over data that costs
  at most a(1)²·E‖x_0‖²/(2·b(1)²) nats (the divergence of p_1 from N(0, b(1)²), by convexity): nothing on the linear
  path, 2·10⁻⁵ a dimension with EDM's σ_max = 80 and σ_data = 0.5, 5·10⁻⁶ with VP's β and σ_data = 0.5.
- Where the grid ends with noise, at t_0 with b(t_0) > 0, the density is that of x_0 + b/a·ε, at the data: no
  correction is made, none is needed for a bound, since this is a density of its own that integrates to one.

A velocity or estimate is a function of each sample alone (no batch statistics); what conditions a sample belongs to the
function. With the coupling `paired` there is no noise at t = 1, and no density of the data.

Shapes: x, x_0, ε [B, …] with D dimensions a sample; t_B one time a sample; P probes of the divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stack.config import Config
from stack.flow.noise import Draws
from stack.flow.path import DDPM, Path, per_sample
from stack.flow.prediction import Estimate
from stack.flow.solvers import VelocityFn, heun

SolverFn = Callable[[VelocityFn, Tensor, Tensor], Tensor]
"""(velocity, x at times[0], times) → x at times[-1]; times may rise."""


class LogDensity(NamedTuple):
    """ln p(x_0) in nats, float64 [B]; the standard error of its trace (0: exact, NaN: of one probe); x_0's noise ε."""

    value_B: Tensor
    std_error_B: Tensor
    noise: Tensor


class Bits(NamedTuple):
    """Negative log-likelihood in bits a dimension and its standard error, as its function says; float64 [B]."""

    value_B: Tensor
    std_error_B: Tensor


class LikelihoodConfig(Config):
    """What the bits a dimension of quantized data are estimated from."""

    levels: int = Field(default=256, ge=2)
    """Values that an element takes, equally spaced from −1 to 1."""
    dequantizations: PositiveInt = 1
    trace: Literal["exact", "rademacher", "gaussian"] = "rademacher"
    """exact costs D gradients an evaluation; the others (Hutchinson's) `probes`. Rademacher's has the lesser variance:
    2·(‖J‖² − Σ J_ii²) a probe for a symmetric Jacobian J, and Gaussian's 2·‖J‖²."""
    probes: PositiveInt = 1

    def probe(self, draws: Draws, x: Tensor, stream: str) -> Tensor | None:
        """Probes e for the samples of `draws`, [P, B, …] like `x`, with E[e·eᵀ] = 1: ±1 or normal (Hutchinson; FFJORD,
        arXiv 1810.01367, §3.1). None for the exact trace."""
        if self.trace == "exact":
            return None
        shape = tuple(x.shape[1:])
        streams = [f"{stream}/probe{i}" for i in range(self.probes)]
        if self.trace == "gaussian":
            return torch.stack([draws.normal(name, shape) for name in streams]).to(x)
        return torch.stack([(draws.uniform(name, shape) - 0.5).sign() for name in streams]).to(x)


@torch.no_grad()
def log_density(
    velocity_fn: VelocityFn,
    path: Path,
    x0: Tensor,
    times: Tensor,
    probe: Tensor | None = None,
    solve: SolverFn = heun,
) -> LogDensity:
    """ln p(x_0) = ln N(x_1; 0, b(1)²) + ∫∇·v dt + D·ln a(t_0), from x_{t_0} = a(t_0)·x_0 at the grid's end t_0.

    times: a sampler's grid, falling; it is walked from its end. probe: [P, B, …] with E[e·eᵀ] = 1, one for a whole
    trajectory, for ∇·v ≈ eᵀ(∂v/∂x)e (Hutchinson; FFJORD, eq. 8), averaged over P; without it the trace is exact.
    The result carries no gradients, and cannot be had under torch.inference_mode.
    """
    near, far = path.at(times[-1]), path.at(times[0])
    num_dims = x0[0].numel()
    exact = probe is None
    if probe is None:
        unit = torch.eye(num_dims, dtype=x0.dtype, device=x0.device).reshape(num_dims, 1, *x0.shape[1:])
        probe = unit.expand(num_dims, *x0.shape)

    def augmented(state: Tensor, t_B: Tensor) -> Tensor:
        x = state[:, :num_dims].reshape(x0.shape)
        velocity, traces_BP = _quadratic_forms(velocity_fn, x, t_B, probe)
        traces = traces_BP.sum(1, keepdim=True) if exact else traces_BP
        return torch.cat([velocity.flatten(1), traces], 1)

    nothing = x0.new_zeros(len(x0), 1 if exact else len(probe))
    state = solve(augmented, torch.cat([float(near.a) * x0.flatten(1), nothing], 1), times.flip(0))
    noise = state[:, :num_dims].reshape(x0.shape) / float(far.b)
    change_BP = state[:, num_dims:].double()
    scale = num_dims * float(near.a.log() - far.b.log() - math.log(2 * math.pi) / 2)
    value_B = scale - noise.double().square().flatten(1).sum(1) / 2 + change_BP.mean(1)
    return LogDensity(value_B, value_B * 0 if exact else _std_error(change_BP), noise)


def _quadratic_forms(velocity_fn: VelocityFn, x: Tensor, t_B: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """v and eᵀ(∂v/∂x)e for each of the P probes, [B, P]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = velocity_fn(x, t_B)
        forms = [
            (torch.autograd.grad(velocity, x, e, retain_graph=True)[0] * e).flatten(1).sum(1) for e in probe
        ]  # by rows rather than in one vmap: any operator of a network has a gradient, and memory stays that of one
    return velocity.detach(), torch.stack(forms, 1)


def dequantized(x0: Tensor, levels: int, u: Tensor) -> Tensor:
    """x_0 [B, …] moved evenly within its bin: x_0 + Δ·(u − ½), Δ = 2/(levels − 1), for u in (0, 1) of its shape (Theis
    et al., arXiv 1511.01844, §3.1)."""
    return x0 + 2 / (levels - 1) * (u.to(x0) - 0.5)


def bits_per_dim(
    velocity_fn: VelocityFn,
    path: Path,
    x0: Tensor,
    times: Tensor,
    draws: Draws,
    config: LikelihoodConfig,
    solve: SolverFn = heun,
) -> Bits:
    """−(E_u[ln p(x_0 + Δ·(u − ½))] + D·ln Δ)/(D·ln 2): an upper bound on −log2 P(x_0)/D of quantized data.

    P is the model's probability of the bin, the integral of p over its volume Δ^D; as x is uniform there, the bound is
    Jensen's inequality (Theis et al., arXiv 1511.01844, §3.1). Bins are centred on the values, so that data mean what
    they did in training; Δ is that of `dequantized`. The expectation is taken by `dequantizations` draws of u, each
    with probes of its own; the standard error is that of the trace alone.

    x0: [B, …], of `levels` values from −1 to 1; draws: of its samples; the rest as in `log_density`.
    """
    spacing = 2 / (config.levels - 1)
    nats_per_bit = x0[0].numel() * math.log(2)
    found = []
    for i in range(config.dequantizations):
        u = draws.uniform(f"dequantization{i}", tuple(x0.shape[1:]))
        probe = config.probe(draws, x0, f"dequantization{i}")
        found.append(log_density(velocity_fn, path, dequantized(x0, config.levels, u), times, probe, solve))
    value_B = -torch.stack([one.value_B for one in found]).mean(0) / nats_per_bit - math.log2(spacing)
    variance_B = torch.stack([one.std_error_B for one in found]).square().mean(0) / config.dequantizations
    return Bits(value_B, variance_B.sqrt() / nats_per_bit)


@torch.no_grad()
def ddpm_bound(
    estimate_fn: Callable[[Tensor, Tensor], Estimate],
    path: DDPM,
    x0: Tensor,
    draws: Draws,
    levels: int = 256,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    terms: int | None = None,
) -> Bits:
    """DDPM's variational bound L_T + Σ_{n=2…T} L_{n−1} + L_0 ≥ −log2 P(x_0) (arXiv 2006.11239, eq. 5), a dimension.

    L_T = KL(q(x_T|x_0) ‖ N(0, 1)). L_{n−1} = KL(q(x_{n−1}|x_n, x_0) ‖ N(μ(x_n, x̂_0), σ_n²)), with q's mean
    μ = a_{n−1}·β_n/b_n²·x_0 + √(1 − β_n)·b_{n−1}²/b_n²·x_n and variance β̃_n = β_n·b_{n−1}²/b_n² (eq. 7), is
    ½·Σ_d[β̃/σ² − 1 − ln(β̃/σ²) + (a_{n−1}·β/b_n²)²·(x_0 − x̂_0)²/σ²]. L_0 = −ln P(x_0) is `discretized_log_prob` of
    N(x̂_0(x_1), σ_1²). variance: σ_n² = β̃_n (fixed_small) or β_n (fixed_large), and β̃_2 for n = 1, as in the authors'
    code: β̃_1 is 0. β_n costs bits that no network wins back, ½·Σ_n(−ln(1 − 1/n) − 1/n) = ½·(1 − 0.577) nats a dimension
    where β is even: 0.3 bits.

    x0: [B, …], of `levels` values from −1 to 1; draws: of its samples. Each expectation is taken by one draw of noise.
    terms: None for all L_{n−1}; else the mean of so many, drawn evenly with replacement for each sample, times T − 1
    (improved DDPM, arXiv 2102.09672, §3.3, with even weights). The standard error is that of this mean; NaN with all
    terms, or one.
    """
    data = x0.double().flatten(1)
    steps = path.steps
    a, b = path.at(torch.arange(steps + 1, dtype=torch.float64, device=x0.device) / steps)[:2]
    forward = 1 - (a[1:] / a[:-1]) ** 2  # β_1 … β_T
    posterior = forward * b[:-1] ** 2 / b[1:] ** 2

    def data_seen(n_B: Tensor, stream: str) -> Tensor:
        """x̂_0 from x_n with noise of its own, float64 [B, D]."""
        t_B = n_B.to(torch.promote_types(x0.dtype, torch.float32)) / steps
        eps = draws.normal(stream, tuple(x0.shape[1:]), x0.dtype).to(x0.device)
        x_n = per_sample(a[n_B], x0) * x0 + per_sample(b[n_B], x0) * eps
        return estimate_fn(x_n, t_B).x0.double().flatten(1)

    def kl_B(n_B: Tensor, stream: str) -> Tensor:
        beta, true = forward[n_B - 1], posterior[n_B - 1]
        model = true if variance == "fixed_small" else beta
        ratio, weight = true / model, (a[n_B - 1] * beta / b[n_B] ** 2) ** 2 / model
        error_B = (data - data_seen(n_B, stream)).square().sum(1)
        return (data.shape[1] * (ratio - 1 - ratio.log()) + weight * error_B) / 2

    if terms is None:
        n_BK = torch.arange(2, steps + 1, device=x0.device).expand(len(x0), -1)
    else:
        n_BK = 2 + (draws.uniform("bound/term", (terms,)) * (steps - 1)).long().to(x0.device)
    kl_BK = (steps - 1) * torch.stack([kl_B(n_B, f"bound/noise{k}") for k, n_B in enumerate(n_BK.T)], 1)
    first = x0.new_ones(len(x0), dtype=torch.long)
    decoder_B = discretized_log_prob(data, data_seen(first, "bound/decoder"), posterior[1].sqrt(), levels).sum(1)
    prior_B = (b[-1] ** 2 - 1 - 2 * b[-1].log() + a[-1] ** 2 * data**2).sum(1) / 2
    nats_per_bit = data.shape[1] * math.log(2)
    std_error_B = _std_error(kl_BK) if terms else torch.full_like(prior_B, math.nan)
    return Bits((prior_B + kl_BK.mean(1) - decoder_B) / nats_per_bit, std_error_B / nats_per_bit)


def discretized_log_prob(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """ln of the integral of N(mean, std²) over the bin of x, of `levels` values from −1 to 1 (DDPM, eq. 13),
    elementwise. The outermost bins reach to infinity."""
    half = 1 / (levels - 1)
    upper = torch.where(x > 1 - half, math.inf, (x + half - mean) / std)
    lower = torch.where(x < half - 1, -math.inf, (x - half - mean) / std)
    mirrored = lower > 0  # the normal distribution's upper tail is 1 in floating point, its lower one is exact
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + (-torch.expm1(torch.special.log_ndtr(lower) - log_upper)).log()


def encode(velocity_fn: VelocityFn, path: Path, x0: Tensor, times: Tensor, solve: SolverFn = heun) -> Tensor:
    """The noise ε = x(t_1)/b(t_1) of which sampling makes x_0 (Score SDE, arXiv 2011.13456, §D.3; DDIM, arXiv
    2010.02502, §5.4), [B, …] of its dtype: dx/dt = v from x(t_0) = a(t_0)·x_0, with t_0 and t_1 the grid's ends.

    times: a sampler's grid, falling; it is walked from its end.
    """
    near, far = path.at(times[-1]), path.at(times[0])
    return solve(velocity_fn, float(near.a) * x0, times.flip(0)) / float(far.b)


def decode(velocity_fn: VelocityFn, path: Path, noise: Tensor, times: Tensor, solve: SolverFn = heun) -> Tensor:
    """x_0 = x(t_0)/a(t_0) of noise ε, [B, …], dx/dt = v from x(t_1) = b(t_1)·ε (DDIM, arXiv 2010.02502, §5.4): the
    inverse of `encode`, so without a last step of denoising where `times` ends early."""
    near, far = path.at(times[-1]), path.at(times[0])
    return solve(velocity_fn, float(far.b) * noise, times) / float(near.a)


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Noise between two noises along the great circle, [W, B, …], for noises [B, …] and weights [W] from 0 to 1.

    sin((1 − w)·θ)/sin θ·first + sin(w·θ)/sin θ·second, θ the angle between the two of each sample (Shoemake, SIGGRAPH
    1985; DDIM, arXiv 2010.02502, appendix D.5): norms stay those of noise, where the straight line's fall by up to √2.
    The line it is where the two are parallel; opposite ones have no great circle of their own, and the result is
    meaningless.
    """
    ends = torch.stack([first.flatten(1), second.flatten(1)]).double()
    cosine_B = torch.nn.functional.cosine_similarity(ends[0], ends[1], dim=1).clamp(-1, 1)
    theta_B = torch.where(cosine_B > 1 - 1e-12, 1e-6, cosine_B.arccos())
    w_W1 = weights.to(ends)[:, None]
    shares = torch.stack([torch.sin((1 - w_W1) * theta_B), torch.sin(w_W1 * theta_B)]) / torch.sin(theta_B)
    return torch.einsum("ewb,ebd->wbd", shares, ends).reshape(len(weights), *first.shape).to(first.dtype)


def _std_error(values_BK: Tensor) -> Tensor:
    """Of the mean over K, [B]; NaN for one value."""
    count = values_BK.shape[1]
    return values_BK.std(1) / count**0.5 if count > 1 else values_BK[:, 0] * math.nan
