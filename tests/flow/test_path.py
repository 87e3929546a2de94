"""Every path against its definition: rates, ends, the papers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from stack.config import UserError, load
from stack.flow.path import DDPM, EDM, VE, VP, Conical, Cosine, Linear, Path, SubVP
from stack.flow.process import FlowConfig

PATHS = [Linear(), Conical(), VP(), SubVP(), Cosine(), DDPM(), DDPM(schedule="scaled_linear")]
PATHS += [DDPM(schedule="cosine"), VE(), EDM()]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x0, eps


def test_zero_is_data_and_one_is_noise() -> None:
    x0, eps = pair()
    x_t = Linear().noised(x0, eps, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], eps[1])
    torch.testing.assert_close(x_t[2], 0.75 * x0[2] + 0.25 * eps[2])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_rates_are_the_derivatives(path: Path) -> None:
    t, h = (
        torch.tensor([0.1234, 0.4567, 0.8765], dtype=torch.float64),
        1e-6,
    )  # not on DDPM's grid, where there are kinks
    c, above, below = path.at(t), path.at(t + h), path.at(t - h)
    torch.testing.assert_close((above.a - below.a) / (2 * h), c.da, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((above.b - below.b) / (2 * h), c.db, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_what_the_span_ends_at(path: Path) -> None:
    c = path.at(torch.tensor(path.span, dtype=torch.float64))
    assert all(torch.isfinite(value).all() for value in c)
    assert c.a[0] == pytest.approx(1, abs=1e-3)
    assert c.b[0] < 0.05
    assert c.b[1] / c.a[1] > 10 or c.a[1] == 0
    t = torch.linspace(*path.span, 1001, dtype=torch.float64)
    ratio = path.at(t)
    assert ((ratio.b / ratio.a).diff() > 0).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_ends_themselves(path: Path) -> None:
    """At t = 0 the rate of b may be infinite; no more is lost there."""
    c = path.at(torch.tensor([0.0, 1.0]))
    assert all(torch.isfinite(value).all() for value in (c.a, c.b, c.da))
    assert not torch.signbit(torch.stack([c.a, c.b])).any()
    assert c.a[0] == 1
    assert (c.db > 0).all()


@pytest.mark.parametrize("path", [VP(), Cosine(), DDPM(), DDPM(schedule="cosine")], ids=str)
def test_variance_is_preserved(path: Path) -> None:
    c = path.at(torch.linspace(*path.span, 11, dtype=torch.float64))
    torch.testing.assert_close(c.a**2 + c.b**2, torch.ones_like(c.a))


def test_the_papers_formulas() -> None:
    t = torch.linspace(0.01, 0.99, 11, dtype=torch.float64)
    beta = 0.1 + t * 19.9
    integral = 0.1 * t + 19.9 * t**2 / 2
    vp, sub = VP().at(t), SubVP().at(t)
    torch.testing.assert_close(vp.da / vp.a, -beta / 2)
    torch.testing.assert_close(vp.b**2, 1 - torch.exp(-integral))  # Score SDE, eq. 29
    torch.testing.assert_close(sub.b, 1 - torch.exp(-integral))
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(Cosine().at(t).a ** 2, f)
    sigma = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7  # EDM, eq. 5, from the last σ to the first
    torch.testing.assert_close(EDM().at(t).b, sigma)
    torch.testing.assert_close(VE().at(t).b, 0.01 * 5000**t)
    torch.testing.assert_close(Conical(sigma_min=0.1).at(t).b, 0.1 + 0.9 * t)


def test_the_ddpm_table() -> None:
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(DDPM().at(steps).a ** 2, product)
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    latent = DDPM(beta_first=0.00085, beta_last=0.012, schedule="scaled_linear")
    torch.testing.assert_close(latent.at(steps).a ** 2, torch.cumprod(1 - roots**2, 0))
    drawn = DDPM().admitted(torch.tensor([1e-9, 0.0005, 0.001, 0.99951, 1.0]))
    torch.testing.assert_close(drawn, torch.tensor([0.001, 0.001, 0.001, 1.0, 1.0]))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_path_is_its_values_used_or_not(path: Path) -> None:
    same, used = type(path).model_validate(path.model_dump()), torch.tensor([0.5])
    assert torch.equal(path.at(used).a, same.at(used).a)
    assert path == same
    assert DDPM(steps=1000) != DDPM(steps=100)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_time_of_a_noise_level(path: Path) -> None:
    t = torch.tensor([0.1, 0.4567, 0.9], dtype=torch.float64)
    c = path.at(t)
    torch.testing.assert_close(path.time_of(c.b / c.a), t, rtol=1e-9, atol=1e-9)
    ends = path.time_of(torch.tensor([0.0, 1e30]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_the_dtype_is_that_of_the_data() -> None:
    x0, eps = pair(torch.float32)
    assert VP().noised(x0, eps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).dtype == torch.float32


def test_levels_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"sigma_min 3\.0 must be below sigma_max 2\.0"):
        load(FlowConfig, overrides=["path.kind=ve", "path.sigma_min=3", "path.sigma_max=2"])
    with pytest.raises(UserError, match=r"beta_last: .* less than 1"):
        load(FlowConfig, overrides=["path.kind=ddpm", "path.beta_last=1"])
    with pytest.raises(UserError, match="path"):
        load(FlowConfig, overrides=["path.kind=straight"])
