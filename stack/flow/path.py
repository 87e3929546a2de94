"""Rectified flow (arXiv 2209.03003; SD3, arXiv 2403.03206, §2): the straight path x_t = (1 − t)·x_0 + t·ε.

t = 0 is data, t = 1 is noise. `t_B` holds one time a sample; x_0, ε, x_t and v have shape [B, …].
"""

from __future__ import annotations

from torch import Tensor


def per_sample(t_B: Tensor, like: Tensor) -> Tensor:
    """`t_B` as [B, 1, …, 1], to multiply `like`, in the dtype of `like`."""
    return t_B.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def interpolate(x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
    """x_t."""
    t = per_sample(t_B, x0)
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """dx_t/dt = ε − x_0, what the network learns."""
    return eps - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """x_0 = x_t − t·v."""
    return x_t - per_sample(t_B, x_t) * v


def eps_from_velocity(x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """ε = x_t + (1 − t)·v."""
    return x_t + (1 - per_sample(t_B, x_t)) * v


def score_from_velocity(x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """∇ log p_t(x_t) = −ε/t, for t > 0."""
    return -eps_from_velocity(x_t, v, t_B) / per_sample(t_B, x_t)
