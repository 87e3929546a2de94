"""Solvers of the probability-flow ODE dx/dt = v(x, t), from noise at t = 1 to data at t = 0.

B batch
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from stack.flow.timesteps import shift_times

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x [B, …], t [B]) → velocity of the shape of x."""


def times(num_steps: int, shift: float = 1.0) -> Tensor:
    """num_steps + 1 times from 1 to 0, evenly spaced, then moved by `shift` (α of `shift_times`). Float64."""
    return shift_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def euler(velocity_fn: VelocityFn, x1: Tensor, times: Tensor) -> Tensor:
    """One evaluation a step, first order. Returns x at the last of `times`."""
    x = x1
    for t, t_next in pairwise(times.tolist()):
        x = x + (t_next - t) * _at(velocity_fn, x, t)
    return x


def heun(velocity_fn: VelocityFn, x1: Tensor, times: Tensor) -> Tensor:
    """Two evaluations a step, second order. Returns x at the last of `times`."""
    x = x1
    for t, t_next in pairwise(times.tolist()):
        v = _at(velocity_fn, x, t)
        v_next = _at(velocity_fn, x + (t_next - t) * v, t_next)
        x = x + (t_next - t) / 2 * (v + v_next)
    return x


def _at(velocity_fn: VelocityFn, x: Tensor, t: float) -> Tensor:
    # Half precision would round the time itself.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return velocity_fn(x, torch.full(x.shape[:1], t, dtype=dtype, device=x.device))
