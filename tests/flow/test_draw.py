"""What holds of every solver: a sample is its own, a trajectory can be kept, what cannot be sampled is said."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from stack.config import UserError, validate
from stack.flow import samplers
from stack.flow.coupling import CouplingConfig
from stack.flow.draw import GuidedConfig, SolverConfig, draw
from stack.flow.noise import NoisePlan
from stack.flow.path import DDPM, EDM, VE, VP, Conical, Linear
from stack.flow.process import FlowConfig
from stack.flow.samplers import NoiseFn

SOLVERS = typing.get_args(SolverConfig.model_fields["solver"].annotation)


def noise_of(numbers: list[int], dtype: torch.dtype = torch.float64) -> NoiseFn:
    draws = NoisePlan(3).at(0, numbers)
    return lambda stream: draws.normal(stream, (2,), dtype)


def config_of(solver: str) -> SolverConfig:
    return SolverConfig(solver=solver, steps=6, shift=1.5, langevin_steps=5, corrections=2, eta=0.5)


def flow_of(solver: str) -> FlowConfig:
    return FlowConfig(path=VE(sigma_max=5) if solver == "langevin" else VP(), prediction="eps")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_is_the_same_whatever_its_batch(mixture, solver: str) -> None:
    flow, config = flow_of(solver), config_of(solver)
    predict = flow.predictor(mixture.network(flow))
    batch, batch_path, alone_path = [4, 7, 1, 12], [], []
    together = draw(flow, predict, noise_of(batch), config, batch_path)
    alone = draw(flow, predict, noise_of([1]), config, alone_path)
    torch.testing.assert_close(together[2], alone[0], rtol=1e-12, atol=1e-12)
    for x, single in zip(batch_path, alone_path, strict=True):
        torch.testing.assert_close(x[2], single[0], rtol=1e-12, atol=1e-12)
    assert (together - alone).abs().amax(1).argmin() == 2
    assert (together[[0, 1, 3]] - alone).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_has_each_time_and_the_data(mixture, solver: str) -> None:
    flow, config = flow_of(solver), config_of(solver)
    predict = flow.predictor(mixture.network(flow))
    kept: list[Tensor] = []
    x0 = draw(flow, predict, noise_of([0, 1, 2]), config, kept)
    assert torch.equal(x0, draw(flow, predict, noise_of([0, 1, 2]), config))
    assert len(kept) == config.steps + 1
    assert torch.equal(kept[-1], x0)
    last = flow.grid(config.steps, config.shift)[-1]
    assert torch.equal(kept[-1], samplers.denoised(flow.estimate_fn(predict), kept[-2], float(last)))


@pytest.mark.parametrize(("path", "evaluations"), [(Linear(), 8), (Conical(), 9), (VP(), 9), (EDM(), 9)])
def test_what_noise_is_left_is_taken_away(mixture, path, evaluations: int) -> None:
    flow = FlowConfig(path=path)
    times = []

    def network(x: Tensor, t_B: Tensor) -> Tensor:
        times.append(float(t_B[0]))
        return mixture.network(flow)(x, t_B)

    draw(flow, flow.predictor(network), noise_of([0]), SolverConfig(solver="euler", steps=8))
    assert len(times) == evaluations


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "langevin"])
def test_a_path_of_one_step_is_sampled_by_what_ends_it(mixture, solver: str) -> None:
    flow, kept = FlowConfig(path=DDPM(steps=1, beta_first=0.999), prediction="v"), []
    predict = flow.predictor(mixture.network(flow))
    x0 = draw(flow, predict, noise_of([0, 1]), config_of(solver), kept)
    start = flow.start(noise_of([0, 1])("noise"), 1.0)
    torch.testing.assert_close(x0, samplers.denoised(flow.estimate_fn(predict), start, 1.0))
    assert len(kept) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_single_precision_stays(mixture, solver: str) -> None:
    flow = flow_of(solver)
    predict = flow.predictor(lambda x, t_B: mixture.network(flow)(x.double(), t_B))
    x0 = draw(flow, predict, noise_of([0, 1], torch.float32), config_of(solver))
    assert x0.dtype == torch.float32
    exact = draw(flow, flow.predictor(mixture.network(flow)), noise_of([0, 1]), config_of(solver))
    assert exact.dtype == torch.float64
    assert x0.isfinite().all()


def test_a_flow_between_data_is_not_sampled_with_noise() -> None:
    flow = FlowConfig(coupling=CouplingConfig(kind="paired"))
    SolverConfig(solver="ddim").check(flow)
    for config in (SolverConfig(solver="ddim", eta=0.5), SolverConfig(solver="euler_maruyama")):
        with pytest.raises(UserError, match=r"adds noise, and with coupling\.kind=paired there is none"):
            config.check(flow)


def test_guidance_that_an_end_of_the_grid_refuses_is_said_before() -> None:
    flow, classifier = FlowConfig(), {"classifier": 1.0}
    with pytest.raises(UserError, match=r"nothing to look at in the noise at t = 1: .* \[0, 0\.99\]"):
        validate(GuidedConfig, {"guidance": classifier}, "x.yaml").check(flow)
    validate(GuidedConfig, {"guidance": {**classifier, "interval": [0, 0.99]}}, "x.yaml").check(flow)
    validate(GuidedConfig, {"guidance": classifier}, "x.yaml").check(FlowConfig(path=VP()))
    momentum = {"scale": 3, "apg": {"momentum": -0.5}}
    with pytest.raises(UserError, match=r"solver heun knows at t = 0"):
        validate(GuidedConfig, {"solver": "heun", "guidance": momentum}, "x.yaml").check(flow)
    validate(GuidedConfig, {"guidance": momentum}, "x.yaml").check(flow)


def test_langevin_wants_an_exploding_path(mixture) -> None:
    flow = FlowConfig(path=VP(), prediction="score")
    with pytest.raises(UserError, match=r"solver langevin wants path.kind ve or edm, got vp"):
        draw(flow, flow.predictor(mixture.network(flow)), noise_of([0]), SolverConfig(solver="langevin"))
    with pytest.raises(ValueError, match=r"wants a path with a = 1, got a = 0\.00"):
        samplers.annealed_langevin(
            flow.estimate_fn(mixture.network(flow)),
            torch.zeros(1, 2),
            torch.tensor([1.0, 0.5]),
            flow.path,
            noise_of([0]),
        )


def test_ddim_with_noise_asks_for_it(mixture) -> None:
    flow = FlowConfig(path=VP(), prediction="eps")
    with pytest.raises(ValueError, match=r"eta 0\.5 draws noise"):
        samplers.ddim(
            flow.estimate_fn(mixture.network(flow)), torch.zeros(1, 2), torch.tensor([1.0, 0.5]), flow.path, 0.5
        )


def test_keys() -> None:
    assert validate(SolverConfig, {"solver": "ddim", "eta": 1}, "x.yaml").eta == 1
    with pytest.raises(UserError, match=r"eta: .* less than or equal to 1"):
        validate(SolverConfig, {"solver": "ddim", "eta": 1.5}, "x.yaml")
    with pytest.raises(UserError, match=r"solver: .*dpm_solver_pp_2m"):
        validate(SolverConfig, {"solver": "dpm++"}, "x.yaml")
    with pytest.raises(UserError, match=r"rtol: .* greater than or equal to 0\.0000001"):
        validate(SolverConfig, {"solver": "dopri5", "rtol": 1e-14}, "x.yaml")
