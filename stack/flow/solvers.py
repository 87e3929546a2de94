"""Solvers of the probability-flow ODE dx/dt = v(x, t), from noise at t = 1 to data at t = 0, or back.

Each takes x [B, …] at the first of `times` [S + 1] and returns it at the last; `keep` is given x at each of the others.
Equations are of a step from t to t + h, h < 0 towards data. Butcher's tables: Hairer, Nørsett & Wanner, Solving
Ordinary Differential Equations I, chapter II.

B batch · S steps
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from stack.flow.path import per_sample

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x [B, …], t [B]) → velocity of the shape of x."""


def euler(velocity_fn: VelocityFn, x: Tensor, times: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """x + h·v(x, t): one evaluation a step, first order."""

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        return x + (t_next - t) * _at(velocity_fn, x, t)

    return _over_grid(step, x, times, keep)


def heun(velocity_fn: VelocityFn, x: Tensor, times: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """The explicit trapezoid rule, x + h/2·(v + v(x + h·v, t + h)) with v = v(x, t): two evaluations a step, second
    order."""

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        v = _at(velocity_fn, x, t)
        v_next = _at(velocity_fn, x + h * v, t_next)
        return x + h / 2 * (v + v_next)

    return _over_grid(step, x, times, keep)


def midpoint(velocity_fn: VelocityFn, x: Tensor, times: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """x + h·v(x + h/2·v(x, t), t + h/2): two evaluations a step, second order, none of them at the last time."""

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        half = x + h / 2 * _at(velocity_fn, x, t)
        return x + h * _at(velocity_fn, half, t + h / 2)

    return _over_grid(step, x, times, keep)


def rk4(velocity_fn: VelocityFn, x: Tensor, times: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """The classical Runge–Kutta method: four evaluations a step, fourth order.

    x + h/6·(k1 + 2·k2 + 2·k3 + k4) with k1 = v(x, t), k2 = v(x + h/2·k1, t + h/2), k3 = v(x + h/2·k2, t + h/2),
    k4 = v(x + h·k3, t + h).
    """

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        k1 = _at(velocity_fn, x, t)
        k2 = _at(velocity_fn, x + h / 2 * k1, t + h / 2)
        k3 = _at(velocity_fn, x + h / 2 * k2, t + h / 2)
        k4 = _at(velocity_fn, x + h * k3, t_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return _over_grid(step, x, times, keep)


def dopri5(
    velocity_fn: VelocityFn, x: Tensor, times: Tensor, keep: list[Tensor] | None = None,
    rtol: float = 1e-5, atol: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Dormand & Prince's pair of orders 5 and 4 (J. Comput. Appl. Math. 6, 1980), steps chosen by its error.

    x + h·Σ B_i·k_i with k_i = v(x + h·Σ_{j<i} A_ij·k_j, t + C_i·h), its error h·Σ E_i·k_i; a step whose error is e ≤ 1
    is kept, and the next one is 0.9·e^(−1/5) times as long, within 0.2 and 10.

    The steps go from the first to the last of `times` whatever lies between; `keep` is given the pair's own
    interpolation, of fourth order. An error estimate is the root mean square over a sample of error/(atol + rtol·|x|).
    Each sample has a time and steps of its own, so that it does not depend on its batch, and every evaluation is of the
    whole batch, to which the network's conditions belong; a batch takes as many as the sample with the most steps.

    Raises ValueError where the tolerance cannot be met: steps become too small.
    """
    from scipy.integrate import RK45 as table

    if len(times) == 1:  # all that a discrete path of one step has
        return x
    first, last = float(times[0]), float(times[-1])
    t = torch.full(x.shape[:1], first, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, (last - first) / 100)
    v = _at(velocity_fn, x, t)
    kept = x.new_zeros(len(times) - 2, *x.shape)
    while bool((t != last).any()):
        ends = (last - t).abs() <= h.abs()
        h = torch.where(ends, last - t, h)
        step = per_sample(h, x)
        k = [v]
        for node, row in zip(table.C[1:], table.A[1:], strict=True):
            k.append(_at(velocity_fn, x + step * _weighted(row, k), t + float(node) * h))
        x_next = x + step * _weighted(table.B, k)
        k.append(_at(velocity_fn, x_next, t + h))

        error = step * _weighted(table.E, k) / (atol + rtol * torch.maximum(x.abs(), x_next.abs()))
        size = error.double().flatten(1).square().mean(1).sqrt().nan_to_num(nan=torch.inf)
        accepted = size <= 1
        if bool((~accepted & (h.abs() < 1e-10 * abs(last - first))).any()):
            raise ValueError(f"dopri5: steps vanish before rtol {rtol} and atol {atol} are met")

        for place, time in zip(kept, times[1:-1].tolist(), strict=True) if keep is not None else ():
            part = (time - t) / h
            powers = torch.stack([part**power for power in (1, 2, 3, 4)])
            weights = torch.as_tensor(table.P, device=x.device) @ powers
            between = x + step * _weighted([per_sample(weight, x) for weight in weights], k)
            inside = accepted & (part > 0) & (part <= 1)
            place[inside] = between[inside]

        t = torch.where(accepted, torch.where(ends, last, t + h), t)
        taken = per_sample(accepted, x).bool()
        x, v = torch.where(taken, x_next, x), torch.where(taken, k[-1], v)
        h = h * (0.9 * size**-0.2).clamp(0.2, 10)
    if keep is not None:
        keep += [*kept, x]
    return x


def _over_grid(
    step: Callable[[Tensor, float, float], Tensor], x: Tensor, times: Tensor, keep: list[Tensor] | None
) -> Tensor:
    for t, t_next in pairwise(times.tolist()):
        x = step(x, t, t_next)
        if keep is not None:
            keep.append(x)
    return x


def _weighted(weights: Iterable[float | Tensor], k: list[Tensor]) -> Tensor:
    """Σ w·k over the k there are; a row of the table may end in zeros."""
    total = torch.zeros_like(k[0])
    for weight, value in zip(weights, k, strict=False):
        total = total + weight * value
    return total


def _at(velocity_fn: VelocityFn, x: Tensor, t: float | Tensor) -> Tensor:
    # Half precision would round the time itself.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return velocity_fn(x, torch.as_tensor(t, dtype=dtype, device=x.device).expand(x.shape[:1]))
