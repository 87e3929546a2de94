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
@pytest.mark.parametrize("end", [0, 1])
def test_at_the_ends_data_and_noise_are_known_unless_the_prediction_says_nothing(
    path: Path, prediction: Prediction, end: int
) -> None:
    t = torch.full((5,), path.span[end], dtype=torch.float64)
    c = path.at(t).like(X0)
    found = estimate(prediction, path, target(prediction, path, X0, EPS, t), path.noised(X0, EPS, t), t)
    says_x0 = not (prediction in ("eps", "score") and float(c.a[0]) == 0)
    says_eps = not (prediction in ("x", "score") and float(c.b[0]) == 0)
    for value, truth, said in ((found.x0, X0, says_x0 and says_eps), (found.eps, EPS, says_x0 and says_eps)):
        if said:
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)
        else:
            assert not torch.isfinite(value).all()


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
