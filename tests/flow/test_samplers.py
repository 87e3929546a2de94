"""Every sampler with the optimal network of a known distribution reaches that distribution."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stack.flow import samplers
from stack.flow.draw import SolverConfig, draw
from stack.flow.path import DDPM, EDM, VE, VP, Coefficients, Conical, Cosine, Linear, SubVP
from stack.flow.process import FlowConfig

COUNT = 2000
PATHS = {
    "linear": Linear(),
    "conical": Conical(),
    "vp": VP(),
    "sub_vp": SubVP(),
    "cosine": Cosine(),
    "ddpm": DDPM(),
    "ve": VE(sigma_max=20),
    "edm": EDM(sigma_max=20),
}


def noise(stream: str) -> Tensor:
    """As `Draws`, but drawn at once for all samples."""
    seed = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=7).digest(), "big")
    return torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(mixture, flow: FlowConfig, **solver) -> Tensor:
    return draw(flow, flow.predictor(mixture.network(flow)), noise, SolverConfig(**solver))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2·E|x − y| − E|x − x'| − E|y − y'| (Székely & Rizzo), 0 only for equal distributions."""
    within = [torch.pdist(z).mean() for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def check(found: Tensor, mixture, tolerance: float = 0.003) -> None:
    assert energy_distance(found, mixture.draw(COUNT, seed=1)) < tolerance
    torch.testing.assert_close(found.mean(0), mixture.mean(), atol=0.06, rtol=0)
    torch.testing.assert_close(found.T.cov(), mixture.covariance(), atol=0.06, rtol=0)


def test_the_check_tells_neighbours_apart(mixture) -> None:
    """What a sampler that forgets the last bit of noise, or moves the data a little, would be told."""
    with pytest.raises(AssertionError):
        check(mixture.draw(COUNT, seed=2) + 0.3 * noise("noise"), mixture)
    with pytest.raises(AssertionError):
        check(mixture.draw(COUNT, seed=2) + 0.15, mixture)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "velocity", "score", "edm"])
def test_the_ode_reaches_the_data_from_any_prediction(mixture, name, prediction) -> None:
    flow = FlowConfig(path=PATHS[name], prediction=prediction, sigma_data=0.7)
    check(drawn(mixture, flow, solver="heun", steps=40), mixture)


@pytest.mark.parametrize("name", PATHS)
def test_euler_on_every_path(mixture, name) -> None:
    steps = 1000 if PATHS[name].explodes else 300  # b' goes through orders of magnitude
    check(drawn(mixture, FlowConfig(path=PATHS[name]), solver="euler", steps=steps), mixture)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("solver", "steps"),
    [("midpoint", 40), ("rk4", 20), ("dopri5", 1), ("dpm_solver_pp_2m", 50), ("ddim", 100), ("ddpm", 150)],
)
def test_every_solver_on_every_path(mixture, name, solver, steps) -> None:
    check(drawn(mixture, FlowConfig(path=PATHS[name]), solver=solver, steps=steps), mixture)


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_ddim_with_half_the_noise_on_a_shifted_grid(mixture, name) -> None:
    check(drawn(mixture, FlowConfig(path=PATHS[name]), solver="ddim", eta=0.5, steps=150, shift=2), mixture)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("solver", "steps"), [("euler_maruyama", 400), ("predictor_corrector", 200)])
def test_the_reverse_sde_agrees_with_the_ode(mixture, name, solver, steps) -> None:
    check(drawn(mixture, FlowConfig(path=PATHS[name]), solver=solver, steps=steps, snr=0.05), mixture)


def at_level(mixture, c: Coefficients, scale: Tensor | float = 1.0):
    """The distribution of x_t/scale."""
    return replace(
        mixture, means=c.a * mixture.means / scale, variances=(c.a**2 * mixture.variances + c.b**2) / scale**2
    )


def check_on_the_way(mixture, flow: FlowConfig, **solver) -> None:
    """p_t at three times of a sampling's grid."""
    config, kept = SolverConfig(**solver), []
    draw(flow, flow.predictor(mixture.network(flow)), noise, config, kept)
    times = flow.grid(config.steps)[1:]
    for place in (len(times) // 4, len(times) // 2, len(times) * 3 // 4):
        c = flow.path.at(times[place])
        scale = (c.a**2 + c.b**2).sqrt()
        assert energy_distance(kept[place] / scale, at_level(mixture, c, scale).draw(COUNT, seed=1)) < 0.004


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("solver", "steps"), [("heun", 40), ("euler_maruyama", 400), ("predictor_corrector", 200), ("ddpm", 150)]
)
def test_marginals_on_the_way_are_the_paths(mixture, name, solver, steps) -> None:
    check_on_the_way(mixture, FlowConfig(path=PATHS[name]), solver=solver, steps=steps, snr=0.05)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["euler_maruyama", "predictor_corrector"])
def test_a_coarse_reverse_sde_stays_near_the_path(mixture, name, solver) -> None:
    flow, config = FlowConfig(path=PATHS[name]), SolverConfig(solver=solver, steps=20)
    kept: list[Tensor] = []
    draw(flow, flow.predictor(mixture.network(flow)), noise, config, kept)
    times = flow.grid(20)[1:]
    square = mixture.covariance().trace() + mixture.mean().square().sum()
    for x, t in zip(kept, times.tolist(), strict=False):
        c = flow.path.at(torch.tensor(t))
        ratio = x.square().sum(1).mean() / (c.a**2 * square + 2 * c.b**2)
        assert 0.5 < ratio < 2, (t, ratio)
    assert energy_distance(kept[-1], mixture.draw(COUNT, seed=1)) < 0.1


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_the_corrector_alone_reaches_its_level(mixture, name) -> None:
    """A step of no length, then only Langevin dynamics: from three times the noise to p_t."""
    flow = FlowConfig(path=PATHS[name])
    t = flow.path.time_of(torch.tensor(1.0))
    fn = flow.estimate_fn(flow.predictor(mixture.network(flow)))
    c = flow.path.at(t)
    found = samplers.predictor_corrector(
        fn, 3 * c.b * noise("start"), t.repeat(2), flow.path, noise, snr=0.15, corrections=200
    )
    check(found, at_level(mixture, c), 0.005)


@pytest.mark.parametrize("path", [VE(sigma_min=0.05, sigma_max=5), EDM(sigma_min=0.05, sigma_max=5)], ids=str)
@pytest.mark.parametrize("prediction", ["score", "eps", "edm"])
def test_annealed_langevin(mixture, path, prediction) -> None:
    flow = FlowConfig(path=path, prediction=prediction)
    solver = {"solver": "langevin", "steps": 11, "langevin_step": 0.4, "langevin_steps": 40}
    check(drawn(mixture, flow, **solver), mixture)
    check_on_the_way(mixture, flow, **solver)
