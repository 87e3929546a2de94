"""What a network may predict, y = p·x_0 + q·ε, and the exact way from each to every other.

With x_t = a·x_0 + b·ε and y, data and noise are the solution of two equations, whose determinant a·q − b·p is zero only
where y says nothing of one of them: data from an ε-prediction or a score where a = 0, noise from an x-prediction where
b = 0. What y itself is, it says everywhere; else x_t alone is the data where b = 0, and the noise where a = 0.

Shapes: x_t, y, x_0 and ε are [B, …]; t_B holds one time a sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stack.flow.path import Coefficients, Path

Prediction = Literal["x", "eps", "v", "velocity", "score", "edm"]
"""x: the data. eps: the noise. v: a·ε − b·x_0 (Salimans & Ho, arXiv 2202.00512). velocity: a'·x_0 + b'·ε, the path's
own. score: ∇ log p_t(x_t | x_0) = −ε/b. edm: F of EDM's preconditioned denoiser (arXiv 2206.00364, eq. 7)."""

SIGMA_DATA = 0.5
"""EDM's standard deviation of the data, in its experiments."""


class Estimate(NamedTuple):
    """Data and noise that a prediction stands for; [B, …]."""

    x0: Tensor
    eps: Tensor


def target_weights(prediction: Prediction, c: Coefficients, sigma_data: float = SIGMA_DATA) -> tuple[Tensor, Tensor]:
    """p and q of y = p·x_0 + q·ε, of the shape of the coefficients.

    x: 1, 0. eps: 0, 1. v: −b, a. velocity: a', b'. score: 0, −1/b. edm, with r = √(b² + a²·σ_data²): b/(σ_data·r),
    −a·σ_data/r.
    """
    zero = c.a * 0
    if prediction == "x":
        return zero + 1, zero
    if prediction == "eps":
        return zero, zero + 1
    if prediction == "v":
        return -c.b, c.a
    if prediction == "velocity":
        return c.da, c.db
    if prediction == "score":
        return zero, -1 / c.b
    # F = (x_0 − c_skip·x)/c_out at σ = b/a and x = x_t/a, multiplied out so that it holds at a = 0 and at b = 0.
    root = (c.b**2 + (c.a * sigma_data) ** 2).sqrt()
    return c.b / (sigma_data * root), -c.a * sigma_data / root


def target(
    prediction: Prediction, path: Path, x0: Tensor, eps: Tensor, t_B: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """y = p·x_0 + q·ε, what the network should say at x_t, [B, …] as x_0 and ε. What counts 0 need not be finite."""
    p, q = target_weights(prediction, path.at(t_B).like(x0), sigma_data)
    return (p * x0).masked_fill(p == 0, 0) + (q * eps).masked_fill(q == 0, 0)


def estimate(
    prediction: Prediction, path: Path, y: Tensor, x_t: Tensor, t_B: Tensor, sigma_data: float = SIGMA_DATA
) -> Estimate:
    """Data and noise from what the network said at x_t, each [B, …]:

        x_0 = (q·x_t − b·y)/(a·q − b·p),  ε = (a·y − p·x_t)/(a·q − b·p)

    Infinite or NaN where y does not say them (module's text), and the noise where a velocity's rate b' is infinite.
    """
    c = path.at(t_B).like(x_t)
    if prediction == "score":
        prediction, y = "eps", -c.b * y
    p, q = target_weights(prediction, c, sigma_data)
    determinant = c.a * q - c.b * p

    def solution(numerator: Tensor, where: Tensor, x_t_over: Tensor) -> Tensor:
        return torch.where(where, x_t, numerator) / torch.where(where, x_t_over, determinant)

    return Estimate(
        y if prediction == "x" else solution(q * x_t - c.b * y, c.b == 0, c.a),
        y if prediction == "eps" else solution(c.a * y - p * x_t, c.a == 0, c.b),
    )


def convert(
    source: Prediction, wanted: Prediction, path: Path, y: Tensor, x_t: Tensor, t_B: Tensor,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:  # fmt: skip
    """The prediction `wanted` that says the same as `y`, [B, …] as it: `target` of the `estimate`."""
    if source == wanted:
        return y
    found = estimate(source, path, y, x_t, t_B, sigma_data)
    return target(wanted, path, found.x0, found.eps, t_B, sigma_data)
