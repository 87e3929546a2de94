"""Every sampler with the optimal network of a known distribution reaches that distribution."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from stack.flow import samplers, solvers
from stack.flow.path import DDPM, EDM, VE, VP, Conical, Cosine, Linear, Path, SubVP
from stack.flow.prediction import Prediction
from stack.flow.process import FlowConfig

COUNT = 4000


def of(path: Path, prediction: Prediction) -> FlowConfig:
    return FlowConfig(path=path, prediction=prediction, sigma_data=0.7)


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


def noise(shape: tuple[int, ...]):
    def draw(stream: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=7).digest(), "big")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


def start(path) -> Tensor:
    return FlowConfig(path=path).start(noise((COUNT, 2))("start"), path.span[1])


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2·E|x − y| − E|x − x'| − E|y − y'| (Székely & Rizzo), 0 only for equal distributions."""
    within = [torch.pdist(z).mean() for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def check(found: Tensor, mixture, tolerance: float = 0.01) -> None:
    assert energy_distance(found, mixture.draw(COUNT, seed=1)) < tolerance
    torch.testing.assert_close(found.mean(0), mixture.mean(), atol=0.08, rtol=0)
    torch.testing.assert_close(found.T.cov(), mixture.covariance(), atol=0.08, rtol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "velocity", "score", "edm"])
def test_the_ode_reaches_the_data_from_any_prediction(mixture, name, prediction):
    path = PATHS[name]
    flow = of(path, prediction)
    times = torch.linspace(*reversed(path.span), 101, dtype=torch.float64).clamp(1e-4, 1 - 1e-6)
    check(solvers.heun(flow.velocity_fn(mixture.network(flow)), start(path), times), mixture)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(mixture, name, eta):
    path = PATHS[name]
    flow = of(path, "eps")
    fn = flow.estimate_fn(mixture.network(flow))
    times = torch.linspace(*reversed(path.span), 201, dtype=torch.float64).clamp(max=1 - 1e-6)
    check(samplers.ddim(fn, start(path), times, path, eta, noise((COUNT, 2))), mixture)


@pytest.mark.parametrize("name", PATHS)
def test_dpm_solver(mixture, name):
    path = PATHS[name]
    flow = of(path, "x")
    fn = flow.estimate_fn(mixture.network(flow))
    times = torch.linspace(*reversed(path.span), 51, dtype=torch.float64).clamp(1e-4, 1 - 1e-6)
    check(samplers.dpm_solver_pp_2m(fn, start(path), times, path), mixture)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "ddpm"])
@pytest.mark.parametrize("corrections", [0, 1])
def test_the_reverse_sde_agrees_with_the_ode(mixture, name, corrections):
    path = PATHS[name]
    flow = of(path, "score")
    fn = flow.estimate_fn(mixture.network(flow))
    times = torch.linspace(*reversed(path.span), 501, dtype=torch.float64)
    draw = noise((COUNT, 2))
    if corrections:
        found = samplers.predictor_corrector(fn, start(path), times, path, draw, snr=0.05)
    else:
        found = samplers.euler_maruyama(fn, start(path), times, path, draw)
    check(found, mixture, 0.02)


def test_annealed_langevin(mixture):
    path = VE(sigma_min=0.05, sigma_max=5)
    sigmas = torch.logspace(0.7, -1.3, 12, dtype=torch.float64).tolist()

    def score(x: Tensor, sigma_B: Tensor) -> Tensor:
        c = path.at(torch.zeros_like(sigma_B)).like(x)._replace(b=sigma_B.reshape(-1, 1).to(x))
        return -mixture.posterior(x, c)[1] / c.b

    x = 5 * noise((COUNT, 2))("start")
    check(samplers.annealed_langevin(score, x, sigmas, noise((COUNT, 2)), step_size=2e-3, steps=40), mixture, 0.02)
