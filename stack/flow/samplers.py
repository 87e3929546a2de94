"""From noise to data along any path, by what a network predicts: stochastic samplers, and those that use x_0 and ε.

`solvers` integrates the probability-flow ODE; what stands here are DDIM and DDPM's ancestral sampling, DPM-Solver++,
the reverse SDE, and Langevin dynamics. Each takes x at times[0] and returns it at times[-1]; times fall; `keep` is
given x at each of the others. Where noise is left at the last time, b > 0, `denoised` takes it away.

Shapes: x, x_0, ε, scores, and what each function returns are [B, …]; `times` is [S + 1] for S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from stack.flow.path import Coefficients, Path
from stack.flow.prediction import Estimate

EstimateFn = Callable[[Tensor, Tensor], Estimate]
"""(x [B, …], t [B]) → the network's data and noise there."""
NoiseFn = Callable[[str], Tensor]
"""A stream's name → standard normal values of the shape of x, the same whenever it is asked for."""


def denoised(fn: EstimateFn, x: Tensor, t: float) -> Tensor:
    """x̂_0(x, t) = (x − b·ε̂)/a: the end of sampling wherever b(t) > 0, that is on all paths but those that reach their
    data (NCSNv2, arXiv 2006.09011, algorithm 1). It is DDPM's step from t = 1/T to 0."""
    return fn(x, _times(x, t)).x0


def ddim(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, eta: float = 0.0, noise: NoiseFn | None = None,
    keep: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """DDIM (arXiv 2010.02502, eq. 12 and 16), on any path: x_s = a_s·x̂_0 + √(b_s² − σ²)·ε̂ + σ·z, σ = η·std of
    q(x_s | x_t, x_0). eta = 1 is DDPM's ancestral sampling with the variance β̃ (arXiv 2006.11239, eq. 6 and 7).

    With eta = 0 it is Euler's method in σ = b/a: on an exploding path EDM's (arXiv 2206.00364, algorithm 1
    without the correction).
    noise: wanted where eta > 0; ValueError without.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} draws noise at each step: give `noise`")
    for step, (t, s) in enumerate(pairwise(times.tolist())):
        found = fn(x, _times(x, t))
        now, then = _at(path, t), _at(path, s)
        sigma = eta * _posterior_std(now, then)
        x = _ddim_step(found, then, sigma)
        if noise is not None and sigma > 0:
            x = x + sigma * noise(f"step{step}")
        _append(keep, x)
    return x


def dpm_solver_pp_2m(fn: EstimateFn, x: Tensor, times: Tensor, path: Path, keep: list[Tensor] | None = None) -> Tensor:
    """DPM-Solver++ (arXiv 2211.01095, algorithm 2), second order, one evaluation a step.

    With λ = ln(a/b) and h = λ_s − λ_t: x_s = b_s/b_t·x + a_s·(1 − e^−h)·D, where D is x̂_0 moved on by half a step along
    its last two values. The first step, and one that ends without noise (h infinite), take x̂_0 itself: first order.
    """
    before: tuple[Tensor, Tensor] | None = None
    for t, s in pairwise(times.tolist()):
        found = fn(x, _times(x, t)).x0
        now, then = _at(path, t), _at(path, s)
        h = (then.a / then.b).log() - (now.a / now.b).log()
        data = found
        if before is not None and then.b > 0:
            data = found + h / before[1] / 2 * (found - before[0])
        # a_s·e^−h is a_t·b_s/b_t, which holds where a_t or b_s is 0.
        x = then.b / now.b * x + (then.a - now.a * then.b / now.b) * data
        before = found, h
        _append(keep, x)
    return x


def euler_maruyama(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, noise: NoiseFn, keep: list[Tensor] | None = None
) -> Tensor:
    """The reverse SDE dx = (f·x − g²·s)dt + g·dw, f = a'/a, g² = 2·b·(b' − f·b) (Score SDE, arXiv 2011.13456, eq. 6),
    by steps of length h towards data, x − h·(f·x − g²·s) + g·√h·z, with s = −ε̂/b.

    A step of length h that would take away more noise than there is, g²·h > b²·(1 − f·h), is an ancestral one instead
    (DDIM's with η = 1): the first where no data is left, a = 0 and f infinite, the last ones where b falls to 0, and
    all on a coarse grid. Euler's would throw x far off the path.
    """
    return predictor_corrector(fn, x, times, path, noise, corrections=0, keep=keep)


def predictor_corrector(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, noise: NoiseFn, snr: float = 0.16, corrections: int = 1,
    keep: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """A step of the reverse SDE as in `euler_maruyama`, then `corrections` of Langevin dynamics at the new level,
    x + δ·s + √(2δ)·z (Score SDE, algorithms 1 to 5).

    snr: r of the corrector's step size δ = 2·α·(r·‖z‖/‖s‖)², with α = a_t²/a_s² of the step from t to s; for the
    quotient of norms stands b_s, its value in many dimensions, so that a sample does not depend on its batch.
    """
    for step, (t, s) in enumerate(pairwise(times.tolist())):
        x = _reverse_step(fn, x, t, s, path, noise(f"step{step}"))
        now, then = _at(path, t), _at(path, s)
        delta = 2 * (now.a / then.a * snr * then.b) ** 2
        for correction in range(corrections if now.a > 0 and then.b > 0 else 0):
            z = noise(f"step{step}/correction{correction}")
            x = x + delta * _score(fn, x, s, then) + (2 * delta).sqrt() * z
        _append(keep, x)
    return x


def annealed_langevin(
    fn: EstimateFn, x: Tensor, times: Tensor, path: Path, noise: NoiseFn, step_size: float = 0.2, steps: int = 100,
    keep: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """NCSN's sampler (arXiv 1907.05600, algorithm 1): at the level b of each of `times`, `steps` times
    x + α/2·s + √α·z with α = step_size·b².

    step_size: NCSN's ε/σ_L², with ε = 2e-5 at σ_L = 0.01 in its experiments.
    Raises ValueError on a path that scales the data: x of one level starts the next as it is.
    """
    for level, t in enumerate(times.tolist()):
        c = _at(path, t)
        if c.a != 1:
            raise ValueError(f"annealed Langevin dynamics wants a path with a = 1, got a = {c.a:.4g} at t = {t}")
        alpha = step_size * c.b**2
        for step in range(steps):
            x = x + alpha / 2 * _score(fn, x, t, c) + alpha.sqrt() * noise(f"level{level}/step{step}")
        if level:
            _append(keep, x)
    return x


def _reverse_step(fn: EstimateFn, x: Tensor, t: float, s: float, path: Path, z: Tensor) -> Tensor:
    found, c, h = fn(x, _times(x, t)), _at(path, t), t - s
    if 2 * h * (c.a * c.db - c.b * c.da) > c.b * (c.a - h * c.da):  # g²·h > b²·(1 − f·h), times a/b
        then = _at(path, s)
        sigma = _posterior_std(c, then)
        return _ddim_step(found, then, sigma) + sigma * z
    f = c.da / c.a
    g2 = 2 * c.b * (c.db - f * c.b)
    return x - h * (f * x + g2 / c.b * found.eps) + (g2 * h).sqrt() * z


def _ddim_step(found: Estimate, then: Coefficients, sigma: Tensor) -> Tensor:
    """a_s·x̂_0 + √(b_s² − σ²)·ε̂, to which noise of standard deviation σ is to be added."""
    return then.a * found.x0 + (then.b**2 - sigma**2).clamp(min=0).sqrt() * found.eps


def _score(fn: EstimateFn, x: Tensor, t: float, c: Coefficients) -> Tensor:
    return -fn(x, _times(x, t)).eps / c.b


def _posterior_std(now: Coefficients, then: Coefficients) -> Tensor:
    """Of q(x_s | x_t, x_0)."""
    return then.b / now.b * (now.b**2 - (now.a / then.a * then.b) ** 2).clamp(min=0).sqrt()


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _at(path: Path, t: float) -> Coefficients:
    """0-dimensional, so that they are float64 among themselves and leave x its dtype and device."""
    return path.at(torch.tensor(t, dtype=torch.float64))


def _append(keep: list[Tensor] | None, x: Tensor) -> None:
    if keep is not None:
        keep.append(x)
