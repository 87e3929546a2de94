"""A mixture of Gaussians, whose marginals along any path, posterior means and scores are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stack.flow.path import Coefficients
from stack.flow.process import FlowConfig, NetworkFn


@dataclass
class Mixture:
    """weights [K], means [K, D], variances [K] of isotropic components."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def draw(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.variances[which, None].sqrt() * noise

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        spread = (self.weights[:, None] * centred).T @ centred
        return spread + (self.weights @ self.variances) * torch.eye(self.means.shape[1], dtype=torch.float64)

    def log_density(self, x: Tensor, c: Coefficients | None = None) -> Tensor:
        """ln p_t(x) [B], of the data itself without coefficients."""
        return torch.logsumexp(self._log_parts(x, c), 1)

    def _log_parts(self, x: Tensor, c: Coefficients | None) -> Tensor:
        a, b = (1.0, 0.0) if c is None else (c.a, c.b)
        variance = a**2 * self.variances + b**2
        square = (x[:, None] - a * self.means if c is None else x[:, None] - a[..., None] * self.means).square().sum(2)
        return self.weights.log() - square / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log()

    def posterior(self, x: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[ε | x_t], both [B, D]; the coefficients are [B, 1]."""
        share = self._log_parts(x, c).softmax(1)
        variance = c.a**2 * self.variances + c.b**2
        rest = (x[:, None] - c.a[..., None] * self.means) / variance[..., None]
        x0 = self.means + (c.a * self.variances)[..., None] * rest
        return (share[..., None] * x0).sum(1), (share[..., None] * c.b[..., None] * rest).sum(1)

    def network(self, flow: FlowConfig) -> NetworkFn:
        """The optimal network: given and saying what a trained one is, the conditional mean of its target."""

        def call(x: Tensor, t_B: Tensor) -> Tensor:
            x = x / flow.input_scale(t_B, x)
            c = flow.path.at(t_B).like(x)
            x0, eps = self.posterior(x, c)
            return flow.example(x0, eps, t_B).target

        return call


@pytest.fixture(scope="session")
def mixture() -> Mixture:
    return Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.0, 0.5], [0.8, -0.4]], dtype=torch.float64),
        torch.tensor([0.05, 0.15], dtype=torch.float64),
    )


@pytest.fixture(scope="session")
def gaussian() -> Mixture:
    return Mixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.5, -1.0]], dtype=torch.float64),
        torch.tensor([0.3], dtype=torch.float64),
    )
