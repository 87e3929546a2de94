"""From noise to data by any solver, for any objective: what a trained network is sampled with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor

from stack.config import Config, UserError
from stack.flow import samplers, solvers
from stack.flow.guidance import GuidanceConfig
from stack.flow.process import FlowConfig, NetworkFn
from stack.flow.samplers import NoiseFn

STOCHASTIC = ("ddpm", "euler_maruyama", "predictor_corrector", "langevin")
ENDS_AT_DATA = ("heun", "rk4", "dopri5")  # which ask the network at the grid's last time as well


class SolverConfig(Config):
    """A solver of `solvers` or `samplers`, and its grid of times. ddpm is ddim with eta = 1."""

    solver: Literal[
        "euler", "heun", "midpoint", "rk4", "dopri5", "ddim", "ddpm", "dpm_solver_pp_2m",
        "euler_maruyama", "predictor_corrector", "langevin",
    ] = "euler"  # fmt: skip
    steps: PositiveInt = 20
    """Of the grid, from noise to data; langevin has one more level than steps. dopri5 takes as many as it needs."""
    shift: PositiveFloat = 1.0
    """Resolution shift of the time grid."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Of ddim: the share of DDPM's noise that each step adds."""
    rtol: float = Field(default=1e-5, ge=1e-7)
    atol: float = Field(default=1e-5, ge=1e-7)
    """Tolerances of dopri5, relative and absolute; what float32 cannot resolve would take steps without end."""
    snr: PositiveFloat = 0.16
    corrections: PositiveInt = 1
    """Of predictor_corrector: r of the Langevin step size, and how many such steps follow one of the SDE."""
    langevin_step: PositiveFloat = 0.2
    langevin_steps: PositiveInt = 100
    """Of langevin: its step size in units of the level's variance, and how many steps it takes at a level."""

    def check(self, flow: FlowConfig) -> None:
        """UserError where the solver cannot sample what `flow` describes."""
        if flow.coupling.kind == "paired" and (self.solver in STOCHASTIC or (self.solver == "ddim" and self.eta > 0)):
            raise UserError(
                f"solver {self.solver} adds noise, and with coupling.kind=paired there is none at any t: take one of "
                "the probability-flow ODE, euler or heun"
            )
        if self.solver == "langevin" and not flow.path.explodes:
            raise UserError(
                f"solver langevin wants path.kind ve or edm, got {flow.path.kind}: it starts each level at the sample "
                "of the one before, which a path that scales the data would have moved"
            )


class GuidedConfig(SolverConfig):
    """A solver and what guides it."""

    guidance: GuidanceConfig = GuidanceConfig()

    @field_validator("guidance", mode="before")
    @classmethod
    def _fill_scale(cls, given: Any) -> Any:
        if isinstance(given, int | float):
            raise ValueError(f"a section, expected guidance.scale={given}")
        return {"scale": cls.model_fields["guidance"].default.scale, **given} if isinstance(given, dict) else given

    def check(self, flow: FlowConfig) -> None:
        """As `SolverConfig.check`, and UserError where guidance would be asked for what a grid's end has not."""
        super().check(flow)
        times, guidance = flow.grid(self.steps, self.shift), self.guidance
        ends, (low, high) = flow.path.at(times[[-1, 0]]), guidance.interval
        if guidance.classifier != 0 and ends.a[1] == 0 and high >= times[0]:
            raise UserError(
                f"guidance.classifier={guidance.classifier:g} has nothing to look at in the noise at t = {times[0]:g}: "
                f"let guidance.interval end below it, [{low:g}, 0.99]"
            )
        if guidance.apg and guidance.apg.momentum and self.solver in ENDS_AT_DATA and ends.b[0] == 0 and low <= 0:
            raise UserError(
                f"guidance.apg.momentum moves data that solver {self.solver} knows at t = 0: let "
                "guidance.interval begin later, or take euler"
            )


def draw(
    flow: FlowConfig, predict: NetworkFn, noise: NoiseFn, config: SolverConfig, keep: list[Tensor] | None = None
) -> Tensor:
    """Data [B, …] in the dtype and on the device of `noise`.

    predict: says the prediction itself, as `FlowConfig.predictor` makes it of a network, guided or not.
    noise: its stream "noise" is what sampling starts from (data, where the coupling is of data with data); the
    stochastic solvers ask for others, "step0" and so on. With streams that belong to a sample's number (`Draws`), a
    sample is the same whatever its batch.
    keep: is given x at each time after the first, and x̂_0 where noise is left at the last and sampling ends with it.
    Raises UserError as `SolverConfig.check`.
    """
    config.check(flow)
    times = flow.grid(config.steps, config.shift)
    x = _integrate(flow, predict, noise, config, times, keep)
    if flow.path.at(times[-1]).b > 0:
        x = samplers.denoised(flow.estimate_fn(predict), x, float(times[-1]))
        if keep is not None:
            keep.append(x)
    return x


def _integrate(
    flow: FlowConfig, predict: NetworkFn, noise: NoiseFn, config: SolverConfig, times: Tensor,
    keep: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    x, path = flow.start(noise("noise"), float(times[0])), flow.path
    velocity, fn = flow.velocity_fn(predict), flow.estimate_fn(predict)
    match config.solver:
        case "euler":
            return solvers.euler(velocity, x, times, keep)
        case "heun":
            return solvers.heun(velocity, x, times, keep)
        case "midpoint":
            return solvers.midpoint(velocity, x, times, keep)
        case "rk4":
            return solvers.rk4(velocity, x, times, keep)
        case "dopri5":
            return solvers.dopri5(velocity, x, times, keep, config.rtol, config.atol)
        case "ddim":
            return samplers.ddim(fn, x, times, path, config.eta, noise, keep)
        case "ddpm":
            return samplers.ddim(fn, x, times, path, 1.0, noise, keep)
        case "dpm_solver_pp_2m":
            return samplers.dpm_solver_pp_2m(fn, x, times, path, keep)
        case "euler_maruyama":
            return samplers.euler_maruyama(fn, x, times, path, noise, keep)
        case "predictor_corrector":
            return samplers.predictor_corrector(fn, x, times, path, noise, config.snr, config.corrections, keep)
        case "langevin":
            size, steps = config.langevin_step, config.langevin_steps
            return samplers.annealed_langevin(fn, x, times, path, noise, size, steps, keep)
