"""From noise to data along any path, by what a network predicts: stochastic samplers, and those that use x_0 and ε.

`solvers` integrates the probability-flow ODE; what stands here are DDIM and DDPM's ancestral sampling, DPM-Solver++,
the reverse SDE, and Langevin dynamics. Each takes x at times[0] and returns it at times[-1]; times fall.

Shapes: x, x_0, ε and scores are [B, …].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stack.flow.path import Coefficients, Path
from stack.flow.prediction import Estimate

EstimateFn = Callable[[Tensor, Tensor], Estimate]
"""(x [B, …], t [B]) → the network's data and noise there."""
NoiseFn = Callable[[str], Tensor]
"""A stream's name → standard normal values of the shape of x, the same whenever it is asked for."""


def ddim(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, eta: float = 0.0, noise: NoiseFn | None = None
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16), on any path. eta = 1 is DDPM's ancestral sampling with the variance β̃.

    noise: wanted where eta > 0.
    """
    for step, (t, s) in enumerate(pairwise(times.tolist())):
        found = fn(x, _times(x, t))
        now, then = _at(path, x, t), _at(path, x, s)
        sigma = eta * _posterior_std(now, then)
        x = then.a * found.x0 + (then.b**2 - sigma**2).clamp(min=0).sqrt() * found.eps
        if eta > 0 and float(sigma.max()) > 0:
            x = x + sigma * _drawn(noise, step)
    return x


def dpm_solver_pp_2m(fn: EstimateFn, x: Tensor, times: Tensor, path: Path) -> Tensor:
    """DPM-Solver++ (arXiv 2211.01095, algorithm 2), second order, one evaluation a step.

    The first step and one that ends without noise are of first order.
    """
    before: tuple[Tensor, float] | None = None
    for t, s in pairwise(times.tolist()):
        found = fn(x, _times(x, t)).x0
        now, then = _at(path, x, t), _at(path, x, s)
        h = float(((then.a / then.b).log() - (now.a / now.b).log()).flatten()[0])
        data = found
        if before is not None and float(then.b.max()) > 0:
            r = before[1] / h
            data = found + (found - before[0]) / (2 * r)
        # a_s·(1 − e^−h) with e^−h = (a_t·b_s)/(b_t·a_s), which is 0 where the step ends without noise
        x = then.b / now.b * x + (then.a - now.a * then.b / now.b) * data
        before = found, h
    return x


def euler_maruyama(fn: EstimateFn, x: Tensor, times: Tensor, path: Path, noise: NoiseFn) -> Tensor:
    """The reverse SDE dx = (f·x − g²·s)dt + g·dw, f = a'/a, g² = 2·b·(b' − b·a'/a) (Score SDE, eq. 6)."""
    for step, (t, s) in enumerate(pairwise(times.tolist())):
        c = _at(path, x, t)
        f, g2 = _drift_and_diffusion(c)
        score = -fn(x, _times(x, t)).eps / c.b
        x = x - (t - s) * (f * x - g2 * score) + (g2 * (t - s)).sqrt() * noise(f"step{step}")
    return x


def predictor_corrector(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, noise: NoiseFn, snr: float = 0.16, corrections: int = 1
) -> Tensor:
    """A step of the reverse SDE, then `corrections` of Langevin dynamics at the new level (Score SDE, algorithms 1–5).

    snr: r of the corrector's step size 2·α·(r·‖z‖/‖s‖)², with α = a_t²/a_s² of the step from t to s; for the quotient of
    norms stands b_s, its value in many dimensions, so that a sample does not depend on its batch.
    """
    for step, (t, s) in enumerate(pairwise(times.tolist())):
        streams = [f"step{step}", *(f"step{step}/correction{i}" for i in range(corrections))]
        x = euler_maruyama(
            fn, x, torch.tensor([t, s], dtype=torch.float64), path, lambda _, name=streams[0]: noise(name)
        )
        now, then = _at(path, x, t), _at(path, x, s)
        if float(then.b.max()) == 0:
            break
        for name in streams[1:]:
            score, z = -fn(x, _times(x, s)).eps / then.b, noise(name)
            size = 2 * (now.a / then.a * snr * then.b) ** 2
            x = x + size * score + (2 * size).sqrt() * z
    return x


def annealed_langevin(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Sequence[float], noise: NoiseFn,
    step_size: float = 2e-5, steps: int = 100,
) -> Tensor:  # fmt: skip
    """NCSN's sampler (arXiv 1907.05600, algorithm 1): `steps` steps at each σ of `sigmas`, which fall, of size
    ε·σ²/σ_last². score: (x [B, …], σ [B]) → ∇ log p_σ(x)."""
    for level, sigma in enumerate(sigmas):
        size = step_size * (sigma / sigmas[-1]) ** 2
        for step in range(steps):
            x = x + size / 2 * score(x, _times(x, sigma)) + size**0.5 * noise(f"level{level}/step{step}")
    return x


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _at(path: Path, x: Tensor, t: float) -> Coefficients:
    return path.at(torch.tensor([t], dtype=torch.float64, device=x.device)).like(x)


def _posterior_std(now: Coefficients, then: Coefficients) -> Tensor:
    """Of q(x_s | x_t, x_0)."""
    return then.b / now.b * (now.b**2 - (now.a / then.a * then.b) ** 2).clamp(min=0).sqrt()


def _drift_and_diffusion(c: Coefficients) -> tuple[Tensor, Tensor]:
    f = c.da / c.a
    return f, 2 * c.b * (c.db - f * c.b)


def _drawn(noise: NoiseFn | None, step: int) -> Tensor:
    if noise is None:
        raise ValueError("eta > 0 draws noise at each step: give `noise`")
    return noise(f"step{step}")
