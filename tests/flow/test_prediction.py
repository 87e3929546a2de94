"""Each prediction says the same as each other, on every path, up to its ends."""

import itertools
from typing import get_args

import pytest
import torch

from stack.flow.path import DDPM, EDM, VE, VP, Conical, Cosine, Linear, Path, SubVP
from stack.flow.prediction import Prediction, convert, estimate, target

PATHS = [Linear(), Conical(), VP(), SubVP(), Cosine(), DDPM(), VE(), EDM()]
PREDICTIONS = get_args(Prediction)
X0, EPS = torch.randn(2, 5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("source", "wanted"), list(itertools.permutations(PREDICTIONS, 2)))
def test_there_and_back(path: Path, source: Prediction, wanted: Prediction) -> None:
    t = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    x_t = path.noised(X0, EPS, t)
    given, other = target(source, path, X0, EPS, t), target(wanted, path, X0, EPS, t)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(convert(source, wanted, path, given, x_t, t), other, **close)
    torch.testing.assert_close(convert(wanted, source, path, other, x_t, t), given, **close)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("end", ["data", "first", "last", "noise"])
def test_at_the_ends_data_and_noise_are_known_unless_the_prediction_says_nothing(
    path: Path, prediction: Prediction, end: str
) -> None:
    """At those of the path itself, and of its span."""
    at = {"data": 0.0, "first": path.span[0], "last": path.span[1], "noise": 1.0}[end]
    t = torch.full((5,), at, dtype=torch.float64)
    c = path.at(t).like(X0)
    found = estimate(prediction, path, target(prediction, path, X0, EPS, t), path.noised(X0, EPS, t), t)
    no_data, no_noise = float(c.a[0]) < 1e-15, float(c.b[0]) == 0  # cosine's a is π/2 rounded at t = 1
    says_x0 = not (prediction in ("eps", "score") and no_data)
    says_eps = not (prediction in ("x", "score") and no_noise) and not (
        prediction == "velocity" and c.db[0].isinf().any()
    )
    for value, truth, said in ((found.x0, X0, says_x0), (found.eps, EPS, says_eps)):
        if said:
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)
        else:
            assert not torch.isclose(value, truth).any()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("prediction", ["v", "eps", "edm"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_targets_at_the_ends_are_of_the_order_of_one(path: Path, prediction: Prediction, t: float) -> None:
    t_B = torch.full((5,), t, dtype=torch.float64)
    expected = {"v": (EPS, -X0), "eps": (EPS, EPS), "edm": (-EPS, 2 * X0)}[prediction][int(t)]
    found = target(prediction, path, X0, EPS, t_B)
    if path.explodes and prediction == "v":  # grows with b
        assert torch.isfinite(found).all()
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0.2)


@pytest.mark.parametrize("path", [Linear(), Conical()], ids=str)
def test_noise_and_score_say_the_same_where_no_data_is_left(path: Path) -> None:
    t = torch.ones(5, dtype=torch.float64)
    x_t, b = path.noised(X0, EPS, t), path.at(t).like(X0).b
    torch.testing.assert_close(convert("eps", "score", path, EPS, x_t, t), -EPS / b)
    torch.testing.assert_close(convert("score", "eps", path, -EPS / b, x_t, t), EPS)


@pytest.mark.parametrize("path", [VP(), Cosine(), DDPM()], ids=str)
def test_where_the_rate_of_noise_is_infinite_any_velocity_says_the_data(path: Path) -> None:
    t = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(convert("velocity", "x", path, EPS, X0, t), X0)


def test_the_definitions() -> None:
    t = torch.full((5,), 0.3, dtype=torch.float64)
    c = VP().at(t).like(X0)
    torch.testing.assert_close(target("v", VP(), X0, EPS, t), c.a * EPS - c.b * X0)
    torch.testing.assert_close(target("velocity", Linear(), X0, EPS, t), EPS - X0)
    torch.testing.assert_close(target("score", VP(), X0, EPS, t), -EPS / c.b)
    # EDM, eq. 7 and table 1: D = c_skip·x + c_out·F
    sigma, sd = float(EDM().at(t[:1]).b), 0.5
    x, f = EDM().noised(X0, EPS, t), target("edm", EDM(), X0, EPS, t)
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2) ** 0.5
    torch.testing.assert_close(skip * x + out * f, X0)
