import math

import numpy as np
import pytest
import torch

from stack.config import UserError, load
from stack.flow.noise import NoisePlan
from stack.flow.path import EDM, VP, Linear, Path
from stack.flow.process import FlowConfig
from stack.flow.timesteps import (
    MAX_MODE_SCALE,
    TimestepConfig,
    flux_shift,
    mode_quantile,
    resolution_shift,
    shift_times,
)

DENSITIES = [
    TimestepConfig(),
    TimestepConfig(mean=0.5, std=0.6, shift=2.0),
    TimestepConfig(kind="uniform"),
    TimestepConfig(kind="uniform", shift=3.0),
    TimestepConfig(kind="mode", scale=1.29),
    TimestepConfig(kind="mode", scale=-0.7, shift=0.5),
    TimestepConfig(kind="cosmap"),
    TimestepConfig(kind="cosmap", shift=1.8),
]
NARROW = TimestepConfig(kind="log_normal", mean=-0.5, std=0.6)  # within the paths' ends
LOG_NORMAL = TimestepConfig(kind="log_normal", mean=-1.2, std=1.2)


def test_mode_figures() -> None:
    f = mode_quantile(torch.tensor([0.1, 0.25], dtype=torch.float64), 1.29)
    torch.testing.assert_close(f.tolist(), [0.802569, 0.616416], rtol=0, atol=5e-7)
    assert pytest.approx(1.7519383938841089, abs=1e-15) == MAX_MODE_SCALE


@pytest.mark.parametrize(
    ("config", "path"),
    [*((config, Linear()) for config in DENSITIES), *((NARROW, path) for path in (Linear(), VP(), EDM()))],
    ids=str,
)
def test_density_is_that_of_the_samples(config: TimestepConfig, path: Path) -> None:
    n = 400_000
    t = config.sample((torch.arange(n, dtype=torch.float64) + 0.5) / n, path)
    assert t.min() > 0
    assert t.max() < 1
    found, edges = np.histogram(t.numpy(), bins=40, range=(0, 1))
    fine = torch.linspace(0, 1, 40 * 50 + 1, dtype=torch.float64)
    middles = (fine[1:] + fine[:-1]) / 2
    mass = config.density(middles, path).reshape(40, 50).mean(1) / 40
    assert len(edges) == 41
    np.testing.assert_allclose(found / n, mass.numpy(), rtol=2e-3, atol=2e-5)
    assert mass.sum().item() == pytest.approx(1, abs=1e-4)


def test_logit_normal_has_the_mean_and_spread_it_says() -> None:
    u = NoisePlan(0).at(0, range(1)).uniform("t", (100_000,))[0]
    logits = torch.logit(TimestepConfig(mean=0.4, std=0.7).sample(u, Linear()))
    assert logits.mean().item() == pytest.approx(0.4, abs=0.01)
    assert logits.std().item() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("path", [Linear(), VP(), EDM()], ids=str)
def test_log_normal_has_the_mean_and_spread_of_the_noise_level_that_it_says(path: Path) -> None:
    u = NoisePlan(0).at(0, range(1)).uniform("t", (20_000,))[0].double()
    c = path.at(LOG_NORMAL.sample(u, path))
    log_sigma = (c.b / c.a).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_stratified_draws_of_a_step_are_evenly_spaced_from_a_start_of_its_own() -> None:
    config, starts = TimestepConfig(kind="uniform", stratified=True), []
    for step in range(20):
        whole = config.draw(NoisePlan(0).at(step, range(16)), 16, Linear())
        torch.testing.assert_close(whole.sort().values.diff(), torch.full((15,), 1 / 16))
        for world in (2, 4):
            for rank in range(world):
                part = config.draw(NoisePlan(0).at(step, range(rank, 16, world)), 16, Linear())
                assert torch.equal(part, whole[rank::world])
        starts.append(float(whole.min()) * 16)
    assert min(starts) < 0.2
    assert max(starts) > 0.8


@pytest.mark.parametrize("config", [TimestepConfig(stratified=True), TimestepConfig(kind="mode", stratified=True)])
def test_stratified_draws_have_the_density_over_steps_and_less_spread_in_a_step(config: TimestepConfig) -> None:
    plan, plain = NoisePlan(0), config.model_copy(update={"stratified": False})
    middles = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    mass = config.density(middles, Linear()).reshape(10, 50).mean(1) / 10

    def shares(config: TimestepConfig) -> torch.Tensor:
        drawn = [config.draw(plan.at(step, range(32)), 32, Linear()) for step in range(400)]
        return torch.stack([torch.histc(t, 10, 0, 1) / 32 for t in drawn]).double()

    torch.testing.assert_close(shares(config).mean(0), mass, rtol=0, atol=0.003)
    assert shares(config).std(0).mean() < shares(plain).std(0).mean() / 2


def test_cosmap_density_formula() -> None:
    assert TimestepConfig(kind="cosmap").density(
        torch.tensor(0.5, dtype=torch.float64), Linear()
    ).item() == pytest.approx(2 / (math.pi - math.pi / 2))


@pytest.mark.parametrize("config", DENSITIES, ids=str)
def test_float32_stays_finite_at_the_ends(config: TimestepConfig) -> None:
    u = torch.tensor([2**-24, 0.5, 1 - 2**-24])
    t = config.sample(u, Linear())
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    torch.testing.assert_close(t.double(), config.sample(u.double(), Linear()), rtol=1e-5, atol=1e-6)


def test_resolution_shift() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_times(t, 3.0)
    torch.testing.assert_close(shift_times(shifted, 1 / 3.0), t)
    torch.testing.assert_close(2 * torch.log((1 - shifted) / shifted), 2 * torch.log((1 - t) / t) - 2 * math.log(3.0))
    assert resolution_shift(1024 * 1024, 256 * 256) == 4.0


def test_flux_figures() -> None:
    assert math.log(flux_shift(256)) == pytest.approx(0.5)
    assert math.log(flux_shift(1024)) == pytest.approx(0.63)
    assert flux_shift(1024) == pytest.approx(1.877611, abs=5e-7)
    assert flux_shift(4096) == pytest.approx(3.158193, abs=5e-7)
    grid = FlowConfig().grid(4, flux_shift(4096))
    torch.testing.assert_close(grid.tolist(), [1.0, 0.904531, 0.759511, 0.512844, 0.0], rtol=0, atol=5e-7)


def test_a_scale_without_a_density_is_refused() -> None:
    with pytest.raises(UserError, match=r"scale of the mode density must lie in -1 … 1\.7519"):
        load(TimestepConfig, overrides=["kind=mode", "scale=1.8"])
