"""Paths from data to noise, x_t = a(t)·x_0 + b(t)·ε with t = 0 at data and t = 1 at noise, in closed form.

Rectified flow (arXiv 2209.03003; SD3, arXiv 2403.03206, §2), flow matching's conical path (arXiv 2210.02747, eq. 20),
and the diffusions as their perturbation kernels: DDPM's Markov chain (arXiv 2006.11239), VP, sub-VP and VE (Score SDE,
arXiv 2011.13456, appendix B), the cosine schedule (arXiv 2102.09672, eq. 17), EDM's (arXiv 2206.00364, table 1).

Shapes: t_B holds one time a sample; x_0, ε and x_t have shape [B, …].
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from stack.config import Config


class Coefficients(NamedTuple):
    """a and b at some times, and their derivatives; all of one shape."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor

    def like(self, x: Tensor) -> Coefficients:
        """As [B, 1, …, 1], to multiply `x`, in the dtype of `x`."""
        return Coefficients(*(per_sample(value, x) for value in self))


def per_sample(t_B: Tensor, like: Tensor) -> Tensor:
    """`t_B` as [B, 1, …, 1], to multiply `like`, in the dtype of `like`."""
    return t_B.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


class Path(Config):
    """a(t) and b(t); b/a grows with t."""

    explodes: ClassVar[bool] = False
    """Whether x_t grows far beyond the data, so that a network is given it scaled down."""

    @property
    def span(self) -> tuple[float, float]:
        """Times nearest to data and to noise between which all coefficients are finite."""
        return 0.0, 1.0

    def at(self, t: Tensor) -> Coefficients:
        """a, b, a' and b' at times t in [0, 1], of the shape of t, in float64."""
        raise NotImplementedError

    def admitted(self, t: Tensor) -> Tensor:
        """Where a network is trained, validated, and a grid goes, instead of `t`, of its shape: the same, or a discrete
        path's next step."""
        return t

    def drawn(self, t: Tensor) -> Tensor:
        """The middle of the times that are `admitted` as `t`, of its shape."""
        return t

    def noised(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """x_t = a·x_0 + b·ε, [B, …] as x_0 and ε, at t_B [B]."""
        c = self.at(t_B).like(x0)
        return c.a * x0 + c.b * eps

    def time_of(self, sigma: Tensor) -> Tensor:
        """t with b(t)/a(t) = σ, the noise-to-data ratio (EDM, arXiv 2206.00364), of the shape of `sigma`, in float64;
        clamped to the path's ends."""
        low, high = (torch.full_like(sigma, end, dtype=torch.float64) for end in (0.0, 1.0))
        for _ in range(53):  # halves the interval until float64 is used up
            middle = (low + high) / 2
            c = self.at(middle)
            below = c.b < sigma * c.a
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Linear(Path):
    """Rectified flow: a = 1 − t, b = t."""

    kind: Literal["linear"] = "linear"

    def at(self, t: Tensor) -> Coefficients:
        """a' = −1, b' = 1."""
        t = t.double()
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)


class Conical(Path):
    """Flow matching's conditional path with the optimal-transport displacement: a = 1 − t, b = σ + (1 − σ)·t."""

    kind: Literal["conical"] = "conical"
    sigma_min: float = Field(default=1e-4, ge=0, lt=1)

    def at(self, t: Tensor) -> Coefficients:
        """a' = −1, b' = 1 − σ."""
        t = t.double()
        one = torch.ones_like(t)
        return Coefficients(1 - t, self.sigma_min + (1 - self.sigma_min) * t, -one, (1 - self.sigma_min) * one)


class _LinearBeta(Path):
    """β(t) = β_0 + t·(β_1 − β_0), the rate of the diffusion."""

    beta_0: PositiveFloat = 0.1
    beta_1: PositiveFloat = 20.0

    @property
    def span(self) -> tuple[float, float]:
        """From Score SDE's ε = 1e-3 (appendix C) on: the rate of VP's b is infinite at 0."""
        return 1e-3, 1.0

    def beta(self, t: Tensor) -> Tensor:
        """β(t) (Score SDE, appendix C), of the shape of t."""
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def _log_a(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2


class VP(_LinearBeta):
    """Variance preserving, continuous in time: a = exp(−½∫β), b = √(1 − a²)."""

    kind: Literal["vp"] = "vp"

    def at(self, t: Tensor) -> Coefficients:
        """a' = −½·β·a, b' = ½·β·a²/b."""
        t = t.double()
        log_a = self._log_a(t)
        return _variance_preserving(log_a, -self.beta(t) / 2)


class SubVP(_LinearBeta):
    """Score SDE's sub-VP: a as in VP, b = 1 − a²."""

    kind: Literal["sub_vp"] = "sub_vp"

    def at(self, t: Tensor) -> Coefficients:
        """a' = −½·β·a, b' = β·a²."""
        t = t.double()
        log_a = self._log_a(t)
        a, rate = log_a.exp(), -self.beta(t) / 2
        return Coefficients(a, -torch.expm1(2 * log_a), a * rate, -2 * a**2 * rate)


class Cosine(Path):
    """Variance preserving with a² = f(t)/f(0), f(t) = cos²(π/2·(t + s)/(1 + s))."""

    kind: Literal["cosine"] = "cosine"
    s: PositiveFloat = 0.008

    @property
    def span(self) -> tuple[float, float]:
        """Short of 0, where the rate of b is infinite, and of 1, where a = 0 and the rate of ln a is."""
        return 1e-3, 1 - 1e-3

    def at(self, t: Tensor) -> Coefficients:
        """a' = −a·tan(φ)·φ' with φ = π/2·(t + s)/(1 + s); b' = −a·a'/b."""
        angle = (t.double() + self.s) / (1 + self.s) * math.pi / 2
        log_a = torch.cos(angle).log() - math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))
        return _variance_preserving(log_a, -torch.tan(angle) * math.pi / 2 / (1 + self.s))


class DDPM(Path):
    """Variance preserving from a table of T rates β_n: ᾱ_n = Π(1 − β) stands at t = n/T, and ln ᾱ is linear between.

    schedule: β evenly spaced from `beta_first` to `beta_last` (DDPM), √β so (Stable Diffusion's "scaled linear"), or of
    `Cosine`'s a at the steps, β_n = min(1 − a_n²/a_{n−1}², 0.999) (arXiv 2102.09672, §3.2).
    """

    kind: Literal["ddpm"] = "ddpm"
    steps: PositiveInt = 1000
    beta_first: float = Field(default=1e-4, gt=0, lt=1)
    beta_last: float = Field(default=0.02, gt=0, lt=1)
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"

    @property
    def span(self) -> tuple[float, float]:
        """From the first step on: between data and it, b' is infinite."""
        return 1 / self.steps, 1.0

    def admitted(self, t: Tensor) -> Tensor:
        """⌈t·T⌉/T, and 1/T at 0."""
        step = (t.double() * self.steps - 1e-3).ceil().clamp(min=1)  # the margin leaves a float32 step as it is
        return (step / self.steps).to(t.dtype)

    def drawn(self, t: Tensor) -> Tensor:
        """t − 1/(2T)."""
        return t - 0.5 / self.steps

    def at(self, t: Tensor) -> Coefficients:
        """From step n − 1 to n a' = T·½·ln(1 − β_n)·a; b' = −a·a'/b."""
        place = t.double() * self.steps
        before = place.ceil().long().clamp(1, self.steps) - 1
        table = _ddpm_log_a(self.steps, self.beta_first, self.beta_last, self.schedule).to(t.device)
        slope = table[before + 1] - table[before]
        return _variance_preserving(table[before] + slope * (place - before), slope * self.steps)


@lru_cache
def _ddpm_log_a(steps: int, beta_first: float, beta_last: float, schedule: str) -> Tensor:
    """At t = 0, 1/T, …, 1. Not kept by the path, which is compared by its values."""
    if schedule == "cosine":
        a = Cosine().at(torch.arange(steps + 1, dtype=torch.float64) / steps).a
        beta = (1 - (a[1:] / a[:-1]) ** 2).clamp(max=0.999)
    else:
        power = 1.0 if schedule == "linear" else 0.5
        beta = torch.linspace(beta_first**power, beta_last**power, steps, dtype=torch.float64) ** (1 / power)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0) / 2])


class _Exploding(Path):
    """a = 1, b from σ_min to σ_max."""

    explodes: ClassVar[bool] = True
    sigma_min: PositiveFloat
    sigma_max: PositiveFloat

    @model_validator(mode="after")
    def _check_order(self) -> _Exploding:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class VE(_Exploding):
    """Variance exploding: b = σ_min·(σ_max/σ_min)^t."""

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 50.0

    def at(self, t: Tensor) -> Coefficients:
        """a' = 0, b' = ln(σ_max/σ_min)·b."""
        t = t.double()
        ratio = math.log(self.sigma_max / self.sigma_min)
        b = self.sigma_min * torch.exp(ratio * t)
        return Coefficients(torch.ones_like(t), b, torch.zeros_like(t), ratio * b)


class EDM(_Exploding):
    """EDM's spacing of noise levels (eq. 5): b = (σ_min^(1/ρ) + t·(σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ."""

    kind: Literal["edm"] = "edm"
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    def at(self, t: Tensor) -> Coefficients:
        """a' = 0, b' = ρ·b^(1 − 1/ρ)·(σ_max^(1/ρ) − σ_min^(1/ρ))."""
        t = t.double()
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        root = low + t * (high - low)
        db = self.rho * root ** (self.rho - 1) * (high - low)
        return Coefficients(torch.ones_like(t), root**self.rho, torch.zeros_like(t), db)


def _variance_preserving(log_a: Tensor, rate: Tensor) -> Coefficients:
    """b = √(1 − a²), from ln a and its derivative."""
    log_a = log_a.clamp(max=0)  # rounded, it may stand above 0 at t = 0
    a, b = log_a.exp(), torch.expm1(2 * log_a).abs().sqrt()  # and −expm1(0) is −0
    return Coefficients(a, b, a * rate, -(a**2) * rate / b)


PathConfig = Annotated[
    Linear | Conical | VP | SubVP | Cosine | DDPM | VE | EDM,
    Field(discriminator="kind"),
]
