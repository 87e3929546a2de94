"""What is learnt: a path from data to noise, what the network says of it, at which times, and how errors count.

A network is any callable (x [B, …], t [B]) → output of the shape of x. Its output is the `prediction` itself, with
three exceptions that keep its input and output of the order of one: for a score it says b·score (NCSNv2, arXiv
2006.09011, §3.3); on an exploding path it is given x/√(σ_data² + b²) (c_in of EDM, arXiv 2206.00364, table 1), and for
a velocity it says velocity/b'.

Losses are mean squares of the network's error, times a weight. At one x_t the errors of all predictions are multiples
of each other: with y = p·x_0 + q·ε the error of y is D_y = a·q − b·p times one common quantity. So a loss on another
prediction is the loss on the network's own times (D_other/D_own)².

Shapes: x, x_0, ε, outputs are [B, …]; t_B holds one time a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor

from stack.config import Config
from stack.flow.coupling import CouplingConfig
from stack.flow.noise import Draws
from stack.flow.path import Coefficients, Linear, PathConfig, per_sample
from stack.flow.prediction import SIGMA_DATA, Estimate, Prediction, estimate, target_weights
from stack.flow.timesteps import TimestepConfig, shift_times

NetworkFn = Callable[[Tensor, Tensor], Tensor]
"""(x [B, …], t [B]) → [B, …]."""

MARGIN = 1e-3
"""How far times stay from an end without noise, where x or a score says nothing of the noise and elbo is infinite."""

MAX_RATIO, FIRST_RATIO = 200.0, 50.0
"""An error of ε̂ is b/a times as large in x̂_0. On a path that goes beyond MAX_RATIO, where DDPM's ends with b/a = 157,
sampling from ε begins at FIRST_RATIO: what it leaves out of the data is 2 % of it."""


VALIDATION_LEVELS = 8


class WeightConfig(Config):
    """w(t) of the loss, by the prediction whose plain mean square it is.

    prediction: the network's own, with w = 1. For a velocity that is conditional flow matching (arXiv 2210.02747), and
    on the linear path SD3's w_t = t/(1 − t)·π(t) (arXiv 2403.03206, §3.1) with t drawn from π.
    eps: DDPM's simple loss (arXiv 2006.11239, eq. 14), and denoising score matching with λ = σ² (NCSN, arXiv
    1907.05600, eq. 6).
    x, v, velocity, edm: of that prediction; edm is EDM's λ(σ) = (σ² + σ_data²)/(σ·σ_data)² on the data's error.
    elbo: the bound on the likelihood, −½·dλ/dt on the noise's error with λ the log-SNR (VDM, arXiv 2107.00630, eq. 17),
    over the density of the times drawn.
    min_snr: min(SNR, γ) on the data's error (arXiv 2303.09556, eq. 8).
    """

    kind: Literal["prediction", "eps", "x", "v", "velocity", "edm", "elbo", "min_snr"] = "prediction"
    gamma: PositiveFloat = 5.0
    """Of min_snr."""


class Example(NamedTuple):
    """What a network is trained on: at x_t [B, …] and t [B] it should say `target` [B, …], which counts `weight_B`."""

    x_t: Tensor
    t_B: Tensor
    target: Tensor
    weight_B: Tensor


class FlowConfig(Config):
    """The objective of a flow or diffusion: any path, prediction, density of times and weight go together."""

    path: PathConfig = Linear()
    prediction: Prediction = "velocity"
    sigma_data: PositiveFloat = SIGMA_DATA
    """Standard deviation of the data, for the prediction edm and for the input's scale on exploding paths."""
    timesteps: TimestepConfig = TimestepConfig()
    weight: WeightConfig = WeightConfig()
    coupling: CouplingConfig = CouplingConfig()

    def times(self, draws: Draws, batch_size: int) -> Tensor:
        """The times at which to train the samples of `draws`, of a global batch of `batch_size`: within the span, since
        a network is asked nowhere else, and weights are without bound at a path's end. Float32 [B]."""
        return self.path.admitted(self.timesteps.draw(draws, batch_size, self.path).clamp(*self.span))

    def validation_times(self, positions: Sequence[int]) -> Tensor:
        """One level a sample, i/8 of the span with i its place in the held-out set modulo 8; float32 [B].

        On the linear path it is the rule of MLPerf Training v5.1.
        """
        first, last = self.span
        levels = torch.tensor([position % VALIDATION_LEVELS / VALIDATION_LEVELS for position in positions])
        return self.path.admitted(first + (last - first) * levels)

    def example(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Example:
        """x_t = a·x_0 + b·ε, what the network should say there, p·x_0 + q·ε, and its weight (`WeightConfig`).

        x0, eps: [B, …]; eps is noise, or what else stands at t = 1. t_B: [B].
        """
        c = self.path.at(t_B)
        p, q = (per_sample(value, x0) for value in self._output(c))
        return Example(self.path.noised(x0, eps, t_B), t_B, p * x0 + q * eps, self._weight(t_B, c).to(x0.dtype))

    def validation_example(self, x0: Tensor, eps: Tensor, positions: Sequence[int]) -> Example:
        """`example` at `validation_times`. They are even, so that the weight elbo counts by no density."""
        even = self.model_copy(update={"timesteps": TimestepConfig(kind="uniform")})
        return even.example(x0, eps, self.validation_times(positions).to(x0.device))

    def loss_B(self, output: Tensor, example: Example) -> Tensor:
        """w(t)·mean((output − target)²) over each sample, float32 [B], of the network's output [B, …]."""
        error = (output.float() - example.target.float()).square().flatten(1).mean(1)
        return example.weight_B * error

    def predictor(self, network: NetworkFn) -> NetworkFn:
        """The prediction itself, y(x, t) [B, …], from a network F as it is trained: F(c_in·x, t) with c_in the
        `input_scale`, but F/b for a score and b'·F for a velocity on an exploding path."""

        def predict(x: Tensor, t_B: Tensor) -> Tensor:
            c = self.path.at(t_B).like(x)
            output = network(x * self.input_scale(t_B, x), t_B).to(x.dtype)
            if self.prediction == "score":
                return output / c.b
            return c.db * output if self._over_rate else output

        return predict

    def input_scale(self, t_B: Tensor, like: Tensor) -> Tensor:
        """c_in, by which x [B, …] is multiplied before a network sees it, [B, 1, …, 1]: 1/√(σ_data² + b²) on an
        exploding path (EDM, arXiv 2206.00364, table 1), else 1."""
        c = self.path.at(t_B).like(like)
        return 1 / (self.sigma_data**2 + c.b**2).sqrt() if self.path.explodes else torch.ones_like(c.b)

    def velocity_fn(self, predict: NetworkFn) -> NetworkFn:
        """dx/dt of the probability-flow ODE, a'·x̂_0 + b'·ε̂ (Score SDE, arXiv 2011.13456, eq. 13).

        predict: says the prediction itself, as `predictor` makes it of a network, guided or not; of x [B, …] and
        t [B], like the velocity.
        """
        if self.prediction == "velocity":
            return predict

        def velocity(x: Tensor, t_B: Tensor) -> Tensor:
            found = estimate(self.prediction, self.path, predict(x, t_B), x, t_B, self.sigma_data)
            c = self.path.at(t_B).like(x)
            return c.da * found.x0 + c.db * found.eps

        return velocity

    def estimate_fn(self, predict: NetworkFn) -> Callable[[Tensor, Tensor], Estimate]:
        """x̂_0 and ε̂, [B, …] each, that `predict` (as in `velocity_fn`) sees in x: `stack.flow.prediction.estimate`."""
        return lambda x, t_B: estimate(self.prediction, self.path, predict(x, t_B), x, t_B, self.sigma_data)

    @cached_property
    def span(self) -> tuple[float, float]:
        """Times, nearest to data and to noise, between which the network says both well and elbo is finite."""
        first, last = self.path.span
        ends = self.path.at(torch.tensor([first, last], dtype=torch.float64))
        if ends.b[0] == 0 and (self.prediction in ("x", "score") or self.weight.kind == "elbo"):
            first = MARGIN
        vanishes = not self.path.explodes and ends.b[1] > MAX_RATIO * ends.a[1]
        if vanishes and self.prediction in ("eps", "score"):
            last = float(self.path.time_of(torch.tensor(FIRST_RATIO)))
        return first, last

    def grid(self, num_steps: int, shift: float = 1.0) -> Tensor:
        """num_steps + 1 falling times over the span [t_0, t_1], float64 [num_steps + 1]: t_0 + (t_1 − t_0)·u', u evenly
        spaced from 1 to 0 and u' = α·u/(1 + (α − 1)·u) with α = `shift` (SD3, arXiv 2403.03206, eq. 23).

        On a discrete path they are steps of it, each once: fewer, where it has no more.
        """
        first, last = self.span
        even = shift_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
        return torch.unique_consecutive(self.path.admitted(first + (last - first) * even))

    def start(self, noise: Tensor, t: float) -> Tensor:
        """x [B, …] at the noisiest time `t` of a grid: b·ε, as if nothing of the data were left."""
        return float(self.path.at(torch.tensor(t, dtype=torch.float64)).b) * noise

    def _output(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        """p and q of the network's output."""
        if self.prediction == "score":
            return c.a * 0, c.a * 0 - 1
        p, q = target_weights(self.prediction, c, self.sigma_data)
        return (p / c.db, q / c.db) if self._over_rate else (p, q)

    @property
    def _over_rate(self) -> bool:
        return self.path.explodes and self.prediction == "velocity"

    def _weight(self, t_B: Tensor, c: Coefficients) -> Tensor:
        """[B], float64."""
        kind = self.weight.kind
        p, q = self._output(c)
        own = (c.a * q - c.b * p) ** 2
        if kind == "prediction":
            return torch.ones_like(own)
        if kind == "elbo":
            density = self.timesteps.density(self.path.drawn(t_B.double()), self.path)
            return c.a * (c.a * c.db - c.b * c.da) / c.b / density / own
        if kind == "min_snr":
            return torch.minimum((c.a / c.b) ** 2, torch.full_like(own, self.weight.gamma)) * c.b**2 / own
        p, q = target_weights(kind, c, self.sigma_data)
        return (c.a * q - c.b * p) ** 2 / own
