"""Bits a dimension of scikit-learn's digits under a small model without labels, trained and judged by `mmdit`.

    python tests/benchmarks/likelihood.py [--json] [--quick] [--only NAME…]

Held-out digits, dequantized alike: by the exact trace, by Hutchinson's, by a normal distribution with the training
digits' mean and covariance, and under even chances. The errors are standard errors: of the mean over digits, and of
the estimate of the trace alone. The last rows say what has to hold: Hutchinson's lies within two standard errors of
its trace from the exact one, and the model needs fewer bits than a normal distribution and than even chances.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from command import parser_of, report, started_with
from torch import Tensor

ROOT = Path(__file__).parents[2]
LEVELS, DIMS = 17, 64


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    unit: str = "bits/dim"
    error: float | None = None
    trace_error: float | None = None
    """None where there is no trace to estimate."""
    target: str | None = None

    def json(self) -> str:
        return json.dumps(asdict(self))

    def text(self) -> str:
        errors = ("" if value is None else f"{value:.4f}" for value in (self.error, self.trace_error))
        return _line(self.name, f"{self.value:.4f}", *errors, self.target or "", self.unit)


def _line(name: str, value: str, error: str, trace_error: str, target: str, unit: str) -> str:
    return f"{name:36} {value:>9} {error:>9} {trace_error:>9} {target:>8}  {unit}".rstrip()


def mmdit(*arguments: object) -> str:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


class Benchmark:
    def __init__(self, quick: bool) -> None:
        self._train_steps, self._num_images, self._solver_steps = (30, 4, 5) if quick else (3000, 128, 40)
        self._folder = tempfile.TemporaryDirectory()
        self.rows: dict[str, Callable[[str], Row]] = {
            "exact trace": partial(self._by_trace, "trace=exact"),
            "Rademacher, 4 probes": partial(self._by_trace, "trace=rademacher", "probes=4"),
            "normal distribution": self._normal,
            "even chances": lambda name: Row(name, math.log2(LEVELS)),
            "Rademacher − exact trace": self._agreement,
            "exact trace − normal distribution": self._below,
            "exact trace − even chances": self._below,
        }
        self._found: dict[str, Row] = {}

    def run(self, name: str) -> Row:
        if name not in self._found:  # differences ask for rows of the report again
            self._found[name] = self.rows[name](name)
        return self._found[name]

    def close(self) -> None:
        self._folder.cleanup()

    @cached_property
    def _run(self) -> Path:
        folder = Path(self._folder.name)
        run, digits = folder / "run", folder / "digits"
        mmdit("data", "digits", digits)
        overrides = (f"run.dir={run}", f"data.source={digits}", f"schedule.steps={self._train_steps}")
        unlabelled = ("objective.classes=0", "objective.preview.guidance.scale=1", "log.wandb=disabled")
        mmdit("train", "configs/train/digits.yaml", *overrides, *unlabelled)
        return run

    def _by_trace(self, *keys_and_name: str) -> Row:
        *keys, name = keys_and_name
        keys += [f"levels={LEVELS}", f"steps={self._solver_steps}"]
        given = [word for key in keys for word in ("--nll-set", key)]
        found = json.loads(mmdit("evaluate", self._run, "--nll", self._num_images, *given))
        errors = {"error": found["bits_per_dim_error"], "trace_error": found["bits_per_dim_trace_error"]}
        return Row(name, found["bits_per_dim"], **errors)

    def _agreement(self, name: str) -> Row:
        """The two have the same draws of u, so that they differ by the estimate of the trace alone."""
        exact, found = self.run("exact trace"), self.run("Rademacher, 4 probes")
        assert found.trace_error is not None
        return Row(name, (found.value - exact.value) / found.trace_error, "standard errors of trace", target="|·| < 2")

    def _below(self, name: str) -> Row:
        less, more = (self.run(part).value for part in name.split(" − "))
        return Row(name, less - more, target="< 0")

    def _normal(self, name: str) -> Row:
        from stack.config import load
        from stack.data.dataset import ImageData, ImageDataset
        from stack.flow.likelihood import dequantized
        from stack.flow.noise import NoisePlan
        from stack.train.recipe import TrainConfig

        config = load(TrainConfig, self._run / "config.yaml")
        assert isinstance(config.data, ImageData)
        data = ImageDataset(config.data, config.run.seed)

        def even(x: Tensor, stream: str) -> Tensor:
            u = NoisePlan(0).at(0, range(len(x))).uniform(stream, tuple(x.shape[1:]))
            return dequantized(x, LEVELS, u).flatten(1).double()

        batches = data.loader(0, data.num_samples // config.data.batch_size, 0, 1, 1)
        train_ND = even(torch.cat([batch.image_BCHW for batch in batches]), "train")
        held_out_ND = even(next(iter(data.validation(self._num_images))).image_BCHW, "held out")
        fitted = torch.distributions.MultivariateNormal(train_ND.mean(0), train_ND.T.cov())
        bits_N = -fitted.log_prob(held_out_ND) / (DIMS * math.log(2)) - math.log2(2 / (LEVELS - 1))
        return Row(name, float(bits_N.mean()), error=float(bits_N.std() / len(bits_N) ** 0.5))


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    started_with({"OMP_NUM_THREADS": "1"})
    header = _line("", "value", "error", "of trace", "target", "unit")
    report(parser, arguments, lambda: Benchmark(arguments.quick), header)


if __name__ == "__main__":
    main()
