"""The same inputs to diffusers' schedulers, the flow_matching library and torchdiffeq: equal tables and trajectories.

All run on the optimal network of a known distribution. diffusers keeps its tables and samples in float32. Its discrete
timestep n − 1 is n/T here; flow_matching's time runs the other way, t_theirs = 1 − t.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor

from stack.flow import samplers, solvers
from stack.flow.path import DDPM, EDM, VP, Cosine, Linear, Path
from stack.flow.prediction import convert
from stack.flow.process import FlowConfig


def noise(seed: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def followed(scheduler, x: Tensor, network: Callable[[Tensor, float], Tensor], times: list[float], **step) -> Tensor:
    """x after each step of a diffusers scheduler, [step, B, 2]; its network is asked at our `times`."""
    found = []
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(network(x, t), timestep, x, **step).prev_sample
        found.append(x)
    return torch.stack(found)


def network_of(mixture, flow: FlowConfig) -> Callable[[Tensor, float], Tensor]:
    network = mixture.network(flow)
    return lambda x, t: network(x, torch.full((len(x),), t, dtype=torch.float64))


def ours(sampler, fn, x: Tensor, times: list[float], *rest, **named) -> Tensor:
    """The trajectory, and x̂_0 at its end."""
    kept: list[Tensor] = []
    last = sampler(fn, x, torch.tensor(times, dtype=torch.float64), *rest, keep=kept, **named)
    return torch.stack([*kept, samplers.denoised(fn, last, times[-1])])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(mixture, shift) -> None:
    flow = FlowConfig()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    grid = flow.grid(20, shift)
    close(grid, scheduler.sigmas)
    close(grid[:-1], scheduler.timesteps / 1000)

    network = network_of(mixture, flow)
    expected = followed(scheduler, noise(), network, grid[:-1].tolist())
    kept: list[Tensor] = []
    solvers.euler(flow.velocity_fn(mixture.network(flow)), noise(), grid, kept)
    close(torch.stack(kept), expected)


def test_flow_match_heun(mixture) -> None:
    """Its last step, to σ = 0, is Euler's."""
    flow = FlowConfig()
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(12)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    expected = followed(scheduler, noise(), network_of(mixture, flow), (scheduler.timesteps / 1000).tolist())

    kept: list[Tensor] = []
    velocity = flow.velocity_fn(mixture.network(flow))
    x = solvers.heun(velocity, noise(), grid[:-1], kept)
    solvers.euler(velocity, x, grid[-2:], kept)
    close(torch.stack(kept), expected[[*range(1, 22, 2), 22]])


@pytest.mark.parametrize(
    ("schedule", "theirs", "betas"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_discrete_variances(schedule, theirs, betas) -> None:
    first, last = betas
    path = DDPM(schedule=schedule, beta_first=first, beta_last=last)
    scheduler = diffusers.DDPMScheduler(beta_schedule=theirs, beta_start=first, beta_end=last)
    c = path.at(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    close(c.a**2, scheduler.alphas_cumprod)
    close(c.b**2, 1 - scheduler.alphas_cumprod)
    steps = path.at(torch.arange(1001, dtype=torch.float64) / 1000).a ** 2
    close(1 - steps[1:] / steps[:-1], scheduler.betas)


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_ddpm(mixture, num_steps) -> None:
    flow = FlowConfig(path=DDPM(), prediction="eps")
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    # In float32 its 1 − ᾱ is wrong by up to 2e-4 of itself near the data.
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(num_steps)
    times = ((scheduler.timesteps + 1).double() / 1000).tolist()
    fn = flow.estimate_fn(mixture.network(flow))
    expected = followed(
        scheduler, noise(), network_of(mixture, flow), times, generator=torch.Generator().manual_seed(7)
    )
    generator = torch.Generator().manual_seed(7)

    def same(stream: str) -> Tensor:
        return torch.randn(64, 2, generator=generator, dtype=torch.float64)

    close(ours(samplers.ddim, fn, noise(), times, flow.path, eta=1.0, noise=same), expected)


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(mixture, prediction, eta) -> None:
    flow = FlowConfig(path=DDPM(), prediction=prediction)
    kind = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}[prediction]
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(25)
    times = ((scheduler.timesteps + 1).double() / 1000).tolist()
    fn = flow.estimate_fn(mixture.network(flow))
    network, x, expected = network_of(mixture, flow), noise(), []
    for step, (timestep, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        x = scheduler.step(network(x, t), timestep, x, eta=eta, variance_noise=noise(100 + step)).prev_sample
        expected.append(x)

    def same(stream: str) -> Tensor:
        return noise(100 + int(stream.removeprefix("step")))

    found = ours(samplers.ddim, fn, noise(), times, flow.path, eta=eta, noise=same)
    # With eta > 0 diffusers' last step, to ᾱ = 1, has no variance either.
    close(found, torch.stack(expected))


@pytest.mark.parametrize("karras", [False, True])
def test_dpm_solver_pp_2m(mixture, karras) -> None:
    flow = FlowConfig(path=DDPM(), prediction="eps")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(20)
    times = flow.path.time_of(scheduler.sigmas[:-1].double()).tolist()
    if not karras:
        close(torch.tensor(times), (scheduler.timesteps + 1) / 1000)
    expected = followed(scheduler, noise(), network_of(mixture, flow), times)
    fn = flow.estimate_fn(mixture.network(flow))
    close(ours(samplers.dpm_solver_pp_2m, fn, noise(), times, flow.path), expected)


def test_dpm_solver_pp_2m_on_a_flow(mixture) -> None:
    flow = FlowConfig()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(20)
    times = scheduler.sigmas[:-1].double().tolist()
    expected = followed(scheduler, noise(), network_of(mixture, flow), times)
    fn = flow.estimate_fn(mixture.network(flow))
    close(ours(samplers.dpm_solver_pp_2m, fn, noise(), times, flow.path), expected)


def test_edm_euler(mixture) -> None:
    flow = FlowConfig(path=EDM(), prediction="edm")
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(18)
    grid = flow.grid(17)
    close(flow.path.at(grid).b, scheduler.sigmas[:-1])
    times = grid.tolist()
    network = network_of(mixture, flow)

    def scaled(x: Tensor, t: float) -> Tensor:
        return network(scheduler.scale_model_input(x, scheduler.timesteps[times.index(t)]), t)

    expected = followed(scheduler, 80 * noise(), scaled, times)
    fn = flow.estimate_fn(flow.predictor(mixture.network(flow)))
    close(ours(samplers.ddim, fn, 80 * noise(), times, flow.path), expected)


@pytest.mark.parametrize(
    ("name", "path"), [("CondOTScheduler", Linear()), ("VPScheduler", VP()), ("CosineScheduler", Cosine(s=1e-9))]
)
def test_paths_of_flow_matching(name: str, path: Path) -> None:
    from flow_matching.path import scheduler

    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    theirs, c = getattr(scheduler, name)()(1 - t), path.at(t)
    close(c.a, theirs.alpha_t)
    close(c.b, theirs.sigma_t)
    close(c.da, -theirs.d_alpha_t)
    # VPScheduler's derivative of σ stands without the chain rule's sign and is not ours to follow.
    if name != "VPScheduler":
        close(c.db, -theirs.d_sigma_t)


@pytest.mark.parametrize(("name", "path"), [("CondOTScheduler", Linear()), ("CosineScheduler", Cosine(s=1e-9))])
def test_conversions_of_flow_matching(name: str, path: Path) -> None:
    from flow_matching.path import AffineProbPath, scheduler

    x0, eps, t_B = noise(1), noise(2), torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    theirs = AffineProbPath(getattr(scheduler, name)())
    sample = theirs.sample(x_0=eps, x_1=x0, t=1 - t_B)
    x_t = path.noised(x0, eps, t_B)
    close(x_t, sample.x_t)
    velocity = -sample.dx_t
    close(convert("x", "velocity", path, x0, x_t, t_B), velocity)
    close(
        convert("velocity", "x", path, velocity, x_t, t_B), theirs.velocity_to_target(-velocity, x_t, 1 - t_B[:, None])
    )
    close(
        convert("velocity", "eps", path, velocity, x_t, t_B),
        theirs.velocity_to_epsilon(-velocity, x_t, 1 - t_B[:, None]),
    )
    close(convert("eps", "velocity", path, eps, x_t, t_B), -theirs.epsilon_to_velocity(eps, x_t, 1 - t_B[:, None]))


@pytest.mark.parametrize(("method", "steps"), [("euler", 20), ("heun2", 20), ("midpoint", 20), ("rk4", 100)])
@pytest.mark.parametrize("path", [Linear(), Cosine(s=1e-9)], ids=lambda path: path.kind)
def test_solvers_of_flow_matching(mixture, path: Path, method: str, steps: int) -> None:
    """Their rk4 is the 3/8 rule, so the two agree to their error."""
    from flow_matching.solver import ODESolver

    flow = FlowConfig(path=path)
    velocity = flow.velocity_fn(mixture.network(flow))
    grid = torch.linspace(0.99, 0.01, steps + 1, dtype=torch.float64)
    theirs = ODESolver(lambda x, t: -velocity(x, (1 - t).expand(len(x)))).sample(
        noise(), step_size=None, method=method, time_grid=1 - grid, return_intermediates=True
    )
    kept: list[Tensor] = []
    getattr(solvers, method.removesuffix("2"))(velocity, noise(), grid, kept)
    close(torch.stack(kept), theirs[1:])


@pytest.mark.parametrize("path", [Linear(), VP(), EDM(sigma_max=20)], ids=lambda path: path.kind)
def test_dormand_prince_of_torchdiffeq(mixture, path: Path) -> None:
    """Their error estimate is Shampine's, so that steps differ and the two agree to their tolerance."""
    flow = FlowConfig(path=path, prediction="v")
    velocity = flow.velocity_fn(flow.predictor(mixture.network(flow)))
    grid = flow.grid(10)
    x1 = flow.start(noise(count=3), 1.0)
    theirs = [
        torchdiffeq.odeint(
            lambda t, x: velocity(x, t.expand(1)), x[None], grid, rtol=1e-9, atol=1e-9, method="dopri5",
            options={"step_t": grid[-1:]},
        )
        for x in x1
    ]  # fmt: skip
    kept: list[Tensor] = []
    solvers.dopri5(velocity, x1, grid, kept, rtol=1e-9, atol=1e-9)
    close(torch.stack(kept), torch.cat(theirs, 1)[1:])
    torch.testing.assert_close(kept[-1], torch.cat(theirs, 1)[-1], rtol=1e-7, atol=1e-7)
