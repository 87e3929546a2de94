"""Which t to train at (SD3, arXiv 2403.03206, §3.1 and §5.3.2; EDM, arXiv 2206.00364, table 1).

Sampling is the quantile function of a uniform u in (0, 1), so that t is a pure function of the noise plan's draw.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor

from stack.config import Config
from stack.flow.noise import Draws
from stack.flow.path import Path

MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Beyond it f(u) of the mode density is not monotone (SD3, below eq. 20)."""


class TimestepConfig(Config):
    """The density of t, and the resolution shift applied to it.

    `mean` and `std` are of logit_normal (in log-odds of t) and of log_normal (of ln σ, with σ = b/a the path's ratio of
    noise to data; EDM has −1.2 and 1.2), `scale` of mode; `shift` is α of `shift_times`.
    """

    kind: Literal["logit_normal", "uniform", "mode", "cosmap", "log_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0
    scale: float = 1.29
    shift: PositiveFloat = 1.0
    stratified: bool = False
    """One uniform number a step, moved on by 1/B from sample to sample: the batch covers all times (VDM, arXiv
    2107.00630, appendix I.1)."""

    @model_validator(mode="after")
    def _check_scale(self) -> TimestepConfig:
        if not -1 <= self.scale <= MAX_MODE_SCALE:
            raise ValueError(f"scale of the mode density must lie in -1 … {MAX_MODE_SCALE:.4f}, got {self.scale}")
        return self

    def draw(self, draws: Draws, batch_size: int, path: Path) -> Tensor:
        """Times for the samples of `draws`, of a global batch of `batch_size`; float32 [B].

        `sample` of u_p, a uniform number of its own for each position p; stratified, of (u + p/batch_size) mod 1.
        """
        if not self.stratified:
            return self.sample(draws.uniform("timestep"), path)
        first = draws.of_step().uniform("timestep")
        return self.sample((first + torch.tensor(draws.positions) / batch_size) % 1, path)

    def sample(self, u: Tensor, path: Path) -> Tensor:
        """t for uniform `u` in (0, 1), of its shape and dtype, then moved by `shift_times`. With z the normal quantile
        of u and the config's mean m and std s:

        logit_normal: 1/(1 + e^−(m + s·z)) (SD3, §3.1). mode: f(u) of `mode_quantile`, from 1 down to 0 as u grows.
        cosmap: 1 − 1/(tan(πu/2) + 1) (SD3, §3.1). log_normal: where b/a = e^(m + s·z) (EDM, table 1). uniform: u.
        """
        if self.kind == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        elif self.kind == "mode":
            t = mode_quantile(u, self.scale)
        elif self.kind == "cosmap":
            t = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
        elif self.kind == "log_normal":
            t = path.time_of(torch.exp(self.mean + self.std * torch.special.ndtri(u))).to(u.dtype)
        else:
            t = u
        return shift_times(t, self.shift)

    def density(self, t: Tensor, path: Path) -> Tensor:
        """π(t) for t in (0, 1), of its shape: the density of what `sample` returns. With t_0 the time before the shift
        α, π(t) = π_0(t_0)·dt_0/dt = π_0(t_0)·α/(α − (α − 1)·t)², and of m, s and the normal density φ π_0 is

        logit_normal: φ((logit t_0 − m)/s)/(s·t_0·(1 − t_0)). mode: |df⁻¹/dt_0|. cosmap:
        2/(π − 2π·t_0 + 2π·t_0²). log_normal: φ((ln σ − m)/s)/s·dlnσ/dt_0, σ = b/a. uniform: 1.
        """
        unshifted = shift_times(t, 1 / self.shift)
        if self.kind == "logit_normal":
            pi = self._normal(torch.logit(unshifted)) / (unshifted * (1 - unshifted))
        elif self.kind == "mode":
            pi = _mode_density(unshifted, self.scale)
        elif self.kind == "cosmap":
            pi = 2 / (math.pi - 2 * math.pi * unshifted + 2 * math.pi * unshifted**2)
        elif self.kind == "log_normal":
            c = path.at(unshifted)
            pi = self._normal((c.b / c.a).log()) * (c.db / c.b - c.da / c.a)
        else:
            pi = torch.ones_like(unshifted)
        return pi * self.shift / (self.shift - (self.shift - 1) * t) ** 2

    def _normal(self, z: Tensor) -> Tensor:
        return torch.exp(-(((z - self.mean) / self.std) ** 2) / 2) / (self.std * math.sqrt(2 * math.pi))


def mode_quantile(u: Tensor, scale: float) -> Tensor:
    """f(u; s) = 1 − u − s·(cos²(πu/2) − 1 + u) (SD3, eq. 20)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _mode_density(t: Tensor, scale: float) -> Tensor:
    """|d f⁻¹/dt|; f has no inverse in closed form, so halve the interval until float64 is used up."""
    target = t.double()
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(53):
        middle = (low + high) / 2
        above = mode_quantile(middle, scale) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    slope = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * (low + high) / 2))
    return (1 / slope).to(t.dtype)


def shift_times(t: Tensor, alpha: float) -> Tensor:
    """t' = α·t/(1 + (α − 1)·t) (SD3, eq. 23), of the shape of t: moves the log-SNR by −2·ln α. Its inverse is the shift
    by 1/α."""
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(num_pixels: float, reference: float) -> float:
    """α = √(m/n) that gives m pixels (or tokens) the noise that n had at the same t (SD3, eq. 22)."""
    return math.sqrt(num_pixels / reference)


def flux_shift(num_image_tokens: int) -> float:
    """FLUX's α = e^μ, with μ linear in the number of image tokens: .5 at 256, 1.15 at 4096 (`time_shift` and
    `get_lin_function` of the authors' inference code; the shift itself is SD3's, arXiv 2403.03206, eq. 23)."""
    mu = 0.5 + (1.15 - 0.5) * (num_image_tokens - 256) / (4096 - 256)
    return math.exp(mu)
