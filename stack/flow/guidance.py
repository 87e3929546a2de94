"""Guidance: a prediction D_y moved away from worse ones, D_∅ without the condition and D_w of a weaker network, and
towards what a classifier asks for. What each adds is summed (as in composable diffusion, arXiv 2206.01714):

    D = D_y + (γ − 1)·(D_y − D_∅) + (γ_w − 1)·(D_y − D_w) + γ_c·∂D/∂s·∇_x log p(y | x_t)

With one of them that is D_∅ + γ·(D_y − D_∅), classifier-free guidance (arXiv 2207.12598); D_w + γ_w·(D_y − D_w),
autoguidance (arXiv 2406.02507); a score s to which γ_c·∇ log p is added, classifier guidance (arXiv 2105.05233).

At one x_t and t every prediction is y = p·x_0 + q·ε, so the differences of one kind are those of another times a factor
of t, and the sum says the same whatever a network predicts. For networks without error D_y − D_∅ is the classifier's
term, so classifier-free and classifier guidance agree.

What the ODE reaches under guidance is NOT the tilted density p(x)·p(y|x)^γ unless γ is 0 or 1: at each t the scores of
the noised densities are added, which is not the score of the noised tilted density. For Gaussians all is known: data
N(m, S²), and N(μ, s²) under the condition, end with standard deviation s^γ·S^(1−γ), where the tilted density has
(γ/s² + (1 − γ)/S²)^(−½). Data N(0, 1), condition N(1, ¼) and γ = 3 end at mean 1.5 and variance 0.0156; the tilted
density has mean 1.2 and variance 0.1. Guidance overshoots and narrows more than its name says.

Shapes: x and predictions are [B, …]; t_B holds one time a sample. All norms and deviations are over a single sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from stack.config import Config, UserError
from stack.flow.path import Coefficients, per_sample
from stack.flow.prediction import Prediction, convert, estimate, target_weights
from stack.flow.process import FlowConfig, NetworkFn

C = TypeVar("C")
"""A batch of conditions: labels, captions."""
PairFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, …], t [B]) → the predictions without and with the condition, each [B, …]."""
ClassifierFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, …], t [B]) → log-probabilities of the classes [B, K]."""


class ApgConfig(Config):
    """Adaptive projected guidance (arXiv 2410.02416): D_y − D_∅ of the data x̂_0 loses part of what lies along x̂_0(y).

    The difference Δ gets `momentum`, Δ_i ← Δ_i + β·Δ_{i−1}, is shortened to `norm_threshold`, and its part parallel to
    x̂_0(y), which saturates, is multiplied by `eta`. With eta 1 and no more than that it is classifier-free guidance.
    """

    eta: NonNegativeFloat = 0.0
    norm_threshold: PositiveFloat | None = None
    """Largest norm of a sample's difference, in units of the data; the paper's 2.5 to 15 grow with the data's size."""
    momentum: float = Field(default=0.0, gt=-1, lt=1)
    """β; the paper's are negative, −0.5 or −0.75, and push away from earlier steps. See `Guided` for what is a step."""


class CfgZeroConfig(Config):
    """CFG-Zero* (arXiv 2503.18886), on velocities: v = s*·v_∅ + γ·(v_y − s*·v_∅), and v = 0 in the first steps.

    zero_above: the velocity is zero at larger t. A time and not a number of steps, so that all solvers mean the same:
    on a grid t_0 > t_1 > … it leaves out k steps of Euler's where t_k ≤ zero_above < t_{k−1}, and none at 1.
    """

    zero_above: float = Field(default=0.99, ge=0, le=1)


class GuidanceConfig(Config):
    """How much of each guidance, and in which form. Nothing of it acts outside of `interval`."""

    scale: float = 1.0
    """γ of classifier-free guidance; 1 is none, and then nothing is evaluated without the condition."""
    autoguidance: float = 1.0
    """γ_w, against a weaker network, an earlier snapshot say (arXiv 2406.02507); 1 is none."""
    classifier: float = 0.0
    """γ_c, by a classifier of noisy data (arXiv 2105.05233); 0 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times t, both ends included, at which there is guidance (arXiv 2404.07724, which gives noise levels σ =
    b/a: `Path.time_of`)."""
    rescale: float = Field(default=0.0, ge=0, le=1)
    """φ of arXiv 2305.08891, §3.4, applied last: the velocity's standard deviation goes that far back to the
    conditional one's. On variance-preserving paths the velocity is the paper's v times a factor of t."""
    apg: ApgConfig | None = None
    cfg_zero: CfgZeroConfig | None = None
    batched: bool = True
    """Whether both halves of classifier-free guidance are one call of the network; two take half the memory."""

    @model_validator(mode="after")
    def _check(self) -> GuidanceConfig:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval {low} … {high} must rise, within 0 (data) … 1 (noise)")
        if self.apg is not None and self.cfg_zero is not None:
            raise ValueError(
                "apg and cfg_zero exclude each other: each puts a difference of its own in place of D_y − D_∅"
            )
        held = 1.0 if self.cfg_zero is None else self.cfg_zero.zero_above
        if held < 1 and not low < held < high:
            raise ValueError(
                f"cfg_zero.zero_above {held} lies outside of interval {low} … {high}, where alone guidance acts: "
                "move either, or give 1, which holds nothing at zero"
            )
        return self

    @property
    def is_none(self) -> bool:
        """Whether the conditional prediction is left as it is."""
        return self.scale == 1 and self.autoguidance == 1 and self.classifier == 0


class Branches(NamedTuple):
    """A network's exact predictions (`FlowConfig.predictor`), of which guidance asks for one or for both."""

    conditional: NetworkFn
    both: PairFn | None = None


def branches(
    flow: FlowConfig,
    network: Callable[[Tensor, Tensor, C], Tensor],
    condition: C,
    null: C,
    cat: Callable[[list[C]], C],
    batched: bool = True,
) -> Branches:
    """One network under a condition, D_y, and without, D_∅ (arXiv 2207.12598), each [B, …] as x.

    network: (x [B, …], t [B], conditions of B samples) → its output. condition, null: of the samples that are drawn.
    cat: joins batches of conditions to a larger one: `torch.cat` for labels, `Context.cat` for captions.
    batched: whether both are one call of twice the batch.
    """
    of_one = flow.predictor(lambda x, t_B: network(x, t_B, condition))
    if not batched:
        of_null = flow.predictor(lambda x, t_B: network(x, t_B, null))
        return Branches(of_one, lambda x, t_B: (of_null(x, t_B), of_one(x, t_B)))
    doubled = cat([null, condition])
    of_two = flow.predictor(lambda x, t_B: network(x, t_B, doubled))

    def both(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        unconditional, conditional = of_two(torch.cat([x, x]), torch.cat([t_B, t_B])).chunk(2)
        return unconditional, conditional

    return Branches(of_one, both)


class Guided:
    """The guided prediction D (the module's equation, and what `config` changes of it), (x [B, …], t [B]) → [B, …], of
    `flow.prediction`, for the samples of one batch.

    `weak` is autoguidance's network, an exact prediction of `flow.prediction` under the same condition; `gradient` is
    of `classifier_gradient`, and with it `branches` may be of a network that knows no condition at all.

    It is a function of x and t, and any solver may call it at any times, with one exception: APG's momentum remembers.
    What it remembers is the difference at the last noisier time. A call at the time of the last one (the second stage
    of a Heun step, and then the next step) takes its place, and a call at a noisier time begins anew: so a solver of
    one evaluation a step does what the paper does, RK4 counts its middle as a step, and after a step that an adaptive
    solver takes back there is no memory. So an object serves one batch, whose conditions it holds anyhow.

    Raises UserError where a scale is given and what it scales is not; when called, where a = 0 (no data in x_t, as at
    t = 1 of the linear path) under classifier guidance, and where b = 0 (nothing but data) with momentum.
    """

    def __init__(
        self,
        config: GuidanceConfig,
        flow: FlowConfig,
        branches: Branches,
        weak: NetworkFn | None = None,
        gradient: NetworkFn | None = None,
    ) -> None:
        for key, scales, thing in (
            ("scale", config.scale != 1 and branches.both is None, "a prediction without the condition"),
            ("autoguidance", config.autoguidance != 1 and weak is None, "a weaker network"),
            ("classifier", config.classifier != 0 and gradient is None, "a classifier"),
        ):
            if scales:
                raise UserError(f"guidance.{key} {getattr(config, key)} needs {thing}")
        self._config = config
        self._flow = flow
        self._branches = branches
        self._weak = weak
        self._gradient = gradient
        self._momentum = _Momentum(config.apg.momentum) if config.apg and config.apg.momentum else None
        # Sums of differences need no conversion; a deviation and s* do, and there is a velocity at any t of a span.
        self._space: Prediction = "velocity" if config.rescale or config.cfg_zero else flow.prediction

    def __call__(self, x: Tensor, t_B: Tensor) -> Tensor:
        config, flow = self._config, self._flow
        inside_B = (t_B >= config.interval[0]) & (t_B <= config.interval[1])
        if config.is_none or not bool(inside_B.any()):
            return self._branches.conditional(x, t_B)

        def here(source: Prediction, wanted: Prediction, y: Tensor) -> Tensor:
            return convert(source, wanted, flow.path, y, x, t_B, flow.sigma_data)

        unconditional, conditional = self._evaluate(x, t_B)
        inside = _wide(inside_B, x)
        cond = guided = here(flow.prediction, self._space, conditional)
        if unconditional is not None:
            uncond = here(flow.prediction, self._space, unconditional)
            guided = guided + (config.scale - 1) * self._difference(uncond, cond, x, t_B, inside)
        if config.autoguidance != 1 and self._weak is not None:
            weak = here(flow.prediction, self._space, self._weak(x, t_B))
            guided = guided + (config.autoguidance - 1) * (cond - weak)
        if config.classifier != 0 and self._gradient is not None:
            guided = guided + config.classifier * self._per_score(x, t_B, inside) * self._gradient(x, t_B)
        if config.rescale > 0:
            guided = rescaled(guided, cond, config.rescale)
        if config.cfg_zero is not None:
            guided = guided.masked_fill(_wide(t_B > config.cfg_zero.zero_above, x), 0)
        return torch.where(inside, here(self._space, flow.prediction, guided), conditional)

    def _evaluate(self, x: Tensor, t_B: Tensor) -> tuple[Tensor | None, Tensor]:
        if self._config.scale == 1 or self._branches.both is None:
            return None, self._branches.conditional(x, t_B)
        return self._branches.both(x, t_B)

    def _difference(self, uncond: Tensor, cond: Tensor, x: Tensor, t_B: Tensor, inside: Tensor) -> Tensor:
        """What is multiplied by γ − 1, in `self._space`."""
        if self._config.cfg_zero is not None:
            return cond - optimal_scale(uncond, cond) * uncond
        difference, apg = cond - uncond, self._config.apg
        if apg is None:
            return difference
        flow = self._flow
        c, determinant = self._at(x, t_B)
        data_per = -c.b / determinant  # how far the data moves with the prediction, at fixed x_t
        if self._momentum is not None:
            if bool(((c.b == 0) & inside).any()):
                raise UserError("guidance.apg.momentum moves data that is known where b = 0: let interval begin later")
            difference = self._momentum(data_per * difference, _wide(t_B, x), inside) / data_per
        if apg.norm_threshold is not None:
            norm = (data_per * difference).flatten(1).norm(dim=1)
            difference = difference * per_sample((apg.norm_threshold / norm).clamp(max=1), x)
        data = estimate(self._space, flow.path, cond, x, t_B, flow.sigma_data).x0
        return difference - (1 - apg.eta) * parallel(difference, data)

    def _per_score(self, x: Tensor, t_B: Tensor, inside: Tensor) -> Tensor:
        """How far the prediction moves with the score, ε = −b·s, at fixed x_t; [B, 1, …, 1]."""
        c, determinant = self._at(x, t_B)
        if bool(((c.a == 0) & inside).any()):
            raise UserError(
                "guidance.classifier has nothing to look at where a = 0, as there is no data in x_t: "
                "let guidance.interval end below that time"
            )
        return -c.b * determinant / c.a

    def _at(self, x: Tensor, t_B: Tensor) -> tuple[Coefficients, Tensor]:
        """The path's coefficients, and a·q − b·p of the prediction y = p·x_0 + q·ε."""
        c = self._flow.path.at(t_B).like(x)
        p, q = target_weights(self._space, c, self._flow.sigma_data)
        return c, c.a * q - c.b * p


class _Momentum:
    """Δ + β·(what it returned at the last noisier time), each sample by itself, and not for samples outside."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, difference: Tensor, t: Tensor, inside: Tensor) -> Tensor:
        nothing = torch.zeros_like(difference)
        last_t, average, before = last = self._last or (t, nothing, nothing)
        before = torch.where(t < last_t, average, torch.where(t > last_t, nothing, before))
        average = difference + self._beta * before
        t, average, before = (
            torch.where(inside, now, then) for now, then in zip((t, average, before), last, strict=True)
        )
        self._last = t, average, before
        return average


def classifier_gradient(classifier: ClassifierFn, label_B: Tensor) -> NetworkFn:
    """(x [B, …], t [B]) → ∇_x log p(y | x_t) [B, …], for the classes y = `label_B`, integers [B] (arXiv 2105.05233).

    The classifier sees x_t as it is, and each sample by itself. Works under `torch.inference_mode` too.
    """

    def gradient(x: Tensor, t_B: Tensor) -> Tensor:
        # Copies, since what inference mode made can't be kept for the way back.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().detach().requires_grad_()
            log_p_BK = classifier(x, t_B.clone())
            return torch.autograd.grad(log_p_BK.gather(1, label_B.clone()[:, None]).sum(), x)[0]

    return gradient


def rescaled(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """(φ·σ_y/σ + 1 − φ)·D (arXiv 2305.08891, eq. 15 and 16), σ the standard deviations within each sample of D and D_y,
    [B, …] each."""
    std_B, wanted_B = (y.flatten(1).std(1, correction=0) for y in (guided, conditional))
    ratio_B = wanted_B / std_B.clamp(min=torch.finfo(guided.dtype).tiny)
    return guided * per_sample(phi * ratio_B + 1 - phi, guided)


def parallel(y: Tensor, onto: Tensor) -> Tensor:
    """Each sample's projection ⟨y, u⟩·u onto the direction u of `onto`, [B, …] each (APG, arXiv 2410.02416); what is
    left of y is orthogonal to it."""
    return optimal_scale(onto, y) * onto


def optimal_scale(uncond: Tensor, cond: Tensor) -> Tensor:
    """s* = ⟨v_y, v_∅⟩/‖v_∅‖² of each sample, which minimises ‖v_y − s·v_∅‖ (arXiv 2503.18886); [B, 1, …, 1]."""
    product_B = (uncond * cond).flatten(1).sum(1)
    square_B = uncond.square().flatten(1).sum(1)
    return per_sample(product_B / square_B.clamp(min=torch.finfo(uncond.dtype).tiny), uncond)


def _wide(value_B: Tensor, like: Tensor) -> Tensor:
    """As [B, 1, …, 1], in its own dtype."""
    return value_B.reshape(-1, *[1] * (like.ndim - 1))
