"""The rows of the objectives' benchmark.

B batch · C channels · H W height, width
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from stack.data.dataset import ImageBatch, ImageData, ImageDataset
from stack.data.digits import LEVELS, write_shards
from stack.flow.guidance import ClassifierFn
from stack.flow.noise import NoisePlan
from stack.flow.path import per_sample
from stack.flow.prediction import Prediction
from stack.parallel.ema import Ema, EmaConfig
from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig
from stack.train.class_to_image import ClassToImage, ClassToImageConfig, PreviewConfig, sample
from stack.train.classifier import Classifier, ClassifierConfig
from stack.train.objective import Objective
from stack.train.schedule import ScheduleConfig, learning_rate

CPU = torch.device("cpu")
CLASSES, SHAPE = 10, (1, 8, 8)
MODEL = {"kind": "dit", "depth": 2, "width": 128, "num_heads": 4, "patch_size": 4}
OPTIM = OptimConfig(lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
BATCH = 64

PATHS = ("linear", "conical", "vp", "sub_vp", "cosine", "ddpm", "ve", "edm")
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
SOLVER = {"solver": "dpm_solver_pp_2m", "steps": 24}


def times_of(path: str) -> dict[str, Any]:
    """The density of t with which the path's own papers train."""
    if path in ("linear", "conical"):
        return {"kind": "logit_normal"}
    if path == "edm":
        return {"kind": "log_normal", "mean": -1.2, "std": 1.2}
    return {"kind": "uniform"}


def weight_of(path: str, prediction: Prediction) -> str:
    """The network's own mean square, but for v where a stays 1: it grows with b, and has EDM's weight."""
    if path in ("ve", "edm") and prediction == "v":
        return "edm"
    return "prediction"


@dataclass(frozen=True)
class Row:
    """`loss` and `seconds` are None where no network was trained for the row."""

    name: str
    timesteps: str
    weight: str
    solver: str
    evaluations: float
    loss: float | None
    energy: float
    accuracy: float
    seconds: float | None

    def json(self) -> str:
        return json.dumps(asdict(self))

    def text(self) -> str:
        loss, seconds = ("–" if value is None else f"{value:.4g}" for value in (self.loss, self.seconds))
        figures = f"{self.evaluations:.4g}", loss, f"{self.energy:.4f}", f"{self.accuracy:.3f}", seconds
        return _line(self.name, self.timesteps, self.weight, self.solver, *figures)


def _line(
    name: str, times: str, weight: str, solver: str, calls: str, loss: str, energy: str, right: str, seconds: str
) -> str:
    figures = f"{calls:>6} {loss:>8} {energy:>8} {right:>8} {seconds:>8}"
    return f"{name:38} {times:13} {weight:11} {solver:19} {figures}".rstrip()


HEADER = _line("", "timesteps", "weight", "solver", "calls", "loss", "energy", "accuracy", "seconds")


class Trained(NamedTuple):
    network: nn.Module
    """With averaged weights."""
    weak: nn.Module
    """The same after a quarter of the steps."""
    config: ClassToImageConfig
    seconds: float


class Digits:
    """The data in memory, `steps` batches of it in the order of training, and who judges what was drawn.

    With `coarse`, each digit has itself at 4×4 as its second image.
    """

    def __init__(self, folder: Path, steps: int, coarse: bool = False) -> None:
        from sklearn.svm import SVC

        write_shards(folder)
        images: dict[str, Any] = {"source": str(folder), "buckets": {"resolution": 8}, "channels": 1, "label": "label"}
        if coarse:
            images["paired"] = str(_write_coarse(folder))
        config = ImageData(**images, batch_size=BATCH, validation_share=0.1)
        self.data = ImageDataset(config, seed=0)
        self.batches: list[ImageBatch] = list(self.data.loader(0, max(steps, self.data.num_samples // BATCH), 0, 1, 1))
        self.held_out: ImageBatch = next(self.data.validation(config.max_validation))
        seen = {key: (x, y) for b in self.batches for key, x, y in zip(b.keys, b.image_BCHW, b.label_B, strict=True)}
        self.train_BCHW, self.train_label_B = (torch.stack(values) for values in zip(*seen.values(), strict=True))
        self.deviation = float(self.train_BCHW.std())
        self._judge = SVC(gamma=0.001).fit(_grey(self.train_BCHW), self.train_label_B.numpy())

    def accuracy(self, image_BCHW: Tensor, label_B: Tensor) -> float:
        return float(self._judge.score(_grey(image_BCHW), label_B.numpy()))

    def energy(self, image_BCHW: Tensor) -> float:
        """Energy distance to the held-out digits, 2·E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖, without bias (Székely & Rizzo,
        J. Stat. Plan. Inference 143, 2013)."""
        x, y = image_BCHW.clamp(-1, 1).flatten(1), self.held_out.image_BCHW.flatten(1)
        return float(2 * torch.cdist(x, y).mean() - _mean_distance(x) - _mean_distance(y))


def _write_coarse(folder: Path) -> Path:
    """Shards in `folder`/coarse of the images in its shards, at half their width and height."""
    from PIL import Image
    from webdataset import TarWriter, WebDataset

    (folder / "coarse").mkdir()
    with TarWriter(str(folder / "coarse" / "00000.tar")) as writer:
        for sample in WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False):
            with Image.open(io.BytesIO(sample["png"])) as image:
                writer.write({"__key__": sample["__key__"], "png": image.reduce(2)})
    return folder / "coarse"


def _mean_distance(x: Tensor) -> Tensor:
    return torch.pdist(x).mean()


def _grey(image_BCHW: Tensor) -> Any:
    """As scikit-learn has them, 0 … 16."""
    return ((image_BCHW.clamp(-1, 1) + 1) / 2 * (LEVELS - 1)).flatten(1).numpy()


class Counted(nn.Module):
    """A network, and how many times it has looked at each of `num_samples`."""

    def __init__(self, network: nn.Module, num_samples: int) -> None:
        super().__init__()
        self.network, self._num_samples, self.evaluations = network, num_samples, 0.0

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        self.evaluations += len(x_BCHW) / self._num_samples
        return self.network(x_BCHW, t_B, label_B)


class Benchmark:
    def __init__(self, quick: bool) -> None:
        self._steps, self._num_samples = (60, 100) if quick else (500, 400)
        self.rows = self._all_rows()
        # Kept for the rows that ask for the same one.
        self._trained = cache(self._train_to)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    @cached_property
    def _digits(self) -> Digits:
        return Digits(Path(self._folder.name) / "digits", self._steps)

    @cached_property
    def _pairs(self) -> Digits:
        return Digits(Path(self._folder.name) / "pairs", self._steps, coarse=True)

    def close(self) -> None:
        self._folder.cleanup()

    def run(self, name: str) -> Row:
        return self.rows[name](name)

    def _all_rows(self) -> dict[str, Callable[[str], Row]]:
        rows: dict[str, Callable[[str], Row]] = {"training digits": self._floor, "untrained": self._untrained}
        for path in PATHS:
            for prediction in PREDICTIONS:
                rows[f"{path} / {prediction}"] = partial(self._row, path, prediction, {})
        rows["coarse digits"] = self._coarse
        rows["coarse digits / velocity"] = self._refined
        for label, guidance in GUIDANCE.items():
            rows[f"guidance: {label}"] = partial(self._row, "linear", "velocity", {"guidance": guidance})
        for path, prediction, how in SOLVERS:
            rows[f"solver: {how['solver']}"] = partial(self._row, path, prediction, how)
        return rows

    def _floor(self, name: str) -> Row:
        """What real digits come to: energy of the training's, the judge's accuracy on the held-out ones."""
        digits, held_out = self._digits, self._digits.held_out
        assert held_out.label_B is not None
        energy, accuracy = digits.energy(digits.train_BCHW), digits.accuracy(held_out.image_BCHW, held_out.label_B)
        return Row(name, "", "", "", 0, None, energy, accuracy, None)

    def _coarse(self, name: str) -> Row:
        """What the second images come to, as they are."""
        held_out = self._pairs.held_out
        assert held_out.label_B is not None
        assert held_out.paired_BCHW is not None
        coarse_BCHW = held_out.paired_BCHW
        energy, accuracy = self._pairs.energy(coarse_BCHW), self._pairs.accuracy(coarse_BCHW, held_out.label_B)
        return Row(name, "", "", "", 0, None, energy, accuracy, None)

    @torch.inference_mode()
    def _refined(self, name: str) -> Row:
        """The flow from the held-out second images to what they are of, without being told the label."""
        digits, held_out = self._pairs, self._pairs.held_out
        config = ClassToImageConfig.model_validate({"model": MODEL, "classes": 0, "coupling": {"kind": "paired"}})
        with torch.inference_mode(False), torch.enable_grad():
            trained = self._train_flow(config, digits, name)
        assert held_out.label_B is not None
        assert held_out.paired_BCHW is not None
        coarse_BCHW, network = held_out.paired_BCHW, Counted(trained.network, len(held_out.label_B))
        how = PreviewConfig.model_validate(SOLVER)
        image_BCHW = sample(network, config, torch.zeros_like(held_out.label_B), lambda stream: coarse_BCHW, how)
        return Row(
            name, config.timesteps.kind, config.weight.kind, how.solver, network.evaluations, None,
            digits.energy(image_BCHW), digits.accuracy(image_BCHW, held_out.label_B), trained.seconds,
        )  # fmt: skip

    def _untrained(self, name: str) -> Row:
        config = self._config("linear", "velocity")
        network = ClassToImage(config, self._digits.data, 0, CPU).network.eval()
        return self._judged(name, Trained(network, network, config, 0.0), {})

    def _row(self, path: str, prediction: Prediction, how: dict[str, Any], name: str) -> Row:
        return self._judged(name, self._trained(path, prediction), how)

    @torch.inference_mode()
    def _judged(self, name: str, trained: Trained, how: dict[str, Any]) -> Row:
        config, digits = trained.config, self._digits
        how = PreviewConfig.model_validate({**SOLVER, **how})
        label_B = torch.arange(self._num_samples) % CLASSES
        draws = NoisePlan(1).at(0, range(self._num_samples))
        network, weak = (Counted(one, self._num_samples) for one in (trained.network, trained.weak))
        classifier = self._classifier if how.guidance.classifier else None

        def noise(stream: str) -> Tensor:
            return draws.normal(stream, SHAPE)

        image_BCHW = sample(network, config, label_B, noise, how, classifier, weak)
        evaluations = network.evaluations + weak.evaluations
        return Row(
            name, config.timesteps.kind, config.weight.kind, how.solver, evaluations, self._loss(trained),
            digits.energy(image_BCHW), digits.accuracy(image_BCHW, label_B), trained.seconds,
        )  # fmt: skip

    def _loss(self, trained: Trained) -> float:
        """Mean square error of ε − x_0 as rectified flow has it, over the held-out digits and t = 1/16, 3/16, … 15/16
        there: elsewhere at the times of the same ratio of noise to data, where x_t differs by a factor only."""
        config, held_out = trained.config, self._digits.held_out
        label_B, x0 = held_out.label_B, held_out.image_BCHW
        assert label_B is not None
        fn = config.estimate_fn(config.predictor(lambda x_BCHW, t_B: trained.network(x_BCHW, t_B, label_B)))
        errors = []
        for level in range(8):
            t = (level + 0.5) / 8
            t_B = torch.full((len(label_B),), float(config.path.time_of(torch.tensor(t / (1 - t)))))
            t_B = config.path.admitted(t_B)
            eps = NoisePlan(2).at(level, held_out.positions).normal("noise", SHAPE)
            c = config.path.at(t_B)
            error = (fn(config.path.noised(x0, eps, t_B), t_B).x0 - x0) * per_sample((c.a + c.b) / c.b, x0)
            errors.append(error.square().mean())
        return float(torch.stack(errors).mean())

    def _config(self, path: str, prediction: Prediction) -> ClassToImageConfig:
        return ClassToImageConfig.model_validate({
            "model": MODEL, "classes": CLASSES, "path": {"kind": path}, "prediction": prediction,
            "timesteps": times_of(path), "weight": {"kind": weight_of(path, prediction)},
            "sigma_data": self._digits.deviation,
        })  # fmt: skip

    def _train_to(self, path: str, prediction: Prediction) -> Trained:
        return self._train_flow(self._config(path, prediction), self._digits, f"{path} / {prediction}")

    def _train_flow(self, config: ClassToImageConfig, digits: Digits, name: str) -> Trained:
        began = time.perf_counter()
        network, weak = self._train(ClassToImage(config, digits.data, 0, CPU), digits, name)
        return Trained(network, weak, config, time.perf_counter() - began)

    @cached_property
    def _classifier(self) -> ClassifierFn:
        config = ClassifierConfig(classes=CLASSES)
        with torch.inference_mode(False), torch.enable_grad():
            network, _ = self._train(Classifier(config, self._digits.data, 0, CPU), self._digits, "classifier")
        network.requires_grad_(False)
        return lambda x_BCHW, t_B: network(x_BCHW * config.flow.input_scale(t_B, x_BCHW), t_B)

    def _train(self, objective: Objective, digits: Digits, name: str) -> tuple[nn.Module, nn.Module]:
        """The network with the averaged weights of all steps, and of a quarter of them."""
        engine = LocalEngine(objective.network, OPTIM, ParallelConfig(precision="fp32"), CPU)
        ema, noise = Ema(engine, EmaConfig(decay=0.99)), NoisePlan(0)
        schedule = ScheduleConfig(steps=self._steps, warmup=self._steps // 10, kind="cosine", final=0.05)
        for step, batch in enumerate(digits.batches[: self._steps]):
            losses = objective.loss(engine.network, batch, noise.at(batch.step, batch.positions))
            engine.backward(losses.total)
            info = engine.step(learning_rate(schedule, OPTIM.lr, step, BATCH))
            if not info.applied:
                raise RuntimeError(f"{name}: loss {float(losses.total)} in step {step}, its gradient is not finite")
            ema.update(step + 1)
            if step + 1 == self._steps // 4:
                weak = _averaged(objective.network, ema)
        print(f"{name}: loss {float(losses.total.detach()):.4f} in step {self._steps}", file=sys.stderr)
        return _averaged(objective.network, ema), weak


def _averaged(network: nn.Module, ema: Ema) -> nn.Module:
    weights = ema.gathered()
    assert weights is not None
    averaged = deepcopy(network).eval()
    averaged.load_state_dict(weights, strict=False)  # buffers are not averaged, and stay
    return averaged


GUIDANCE: dict[str, dict[str, Any]] = {
    "CFG 1.5": {"scale": 1.5},
    "CFG 3": {"scale": 3},
    "APG 3": {"scale": 3, "apg": {"norm_threshold": 2.5, "momentum": -0.5}},
    "CFG-Zero* 3": {"scale": 3, "cfg_zero": {}},
    "autoguidance 2": {"autoguidance": 2},
    "classifier 1": {"classifier": 1, "interval": [0, 0.96]},
}
SOLVERS: list[tuple[str, Prediction, dict[str, Any]]] = [
    *[("linear", "velocity", {"solver": solver, "steps": steps}) for solver, steps in (
        ("euler", 24), ("heun", 12), ("midpoint", 12), ("rk4", 6), ("ddim", 24), ("ddpm", 24), ("euler_maruyama", 24),
        ("predictor_corrector", 12),
    )],
    ("linear", "velocity", {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}),
    ("ve", "edm", {"solver": "langevin", "steps": 11}),
]  # fmt: skip
