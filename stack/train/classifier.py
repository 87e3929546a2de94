"""Training a classifier of noisy images, log p(y | x_t), for classifier guidance (ADM, arXiv 2105.05233, §4).

Shapes: B batch · C channels · H W height, width · K classes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from stack.config import Config, UserError
from stack.data.dataset import ImageBatch, ImageDataset
from stack.flow.noise import Draws, NoisePlan
from stack.flow.path import Linear, PathConfig
from stack.flow.prediction import SIGMA_DATA
from stack.flow.process import VALIDATION_LEVELS, FlowConfig
from stack.flow.timesteps import TimestepConfig
from stack.models.classifier import ClassifierNetworkConfig, NoisyClassifier
from stack.train import snapshot
from stack.train.objective import Losses

LogProbabilities = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B]) → log p(y | x_t) [B, K]."""


class ClassifierConfig(Config):
    kind: Literal["classifier"] = "classifier"
    model: ClassifierNetworkConfig = ClassifierNetworkConfig()
    classes: int = Field(ge=2)
    path: PathConfig = Linear()
    """That of the model which is to be guided."""
    timesteps: TimestepConfig = TimestepConfig(kind="uniform")
    sigma_data: PositiveFloat = SIGMA_DATA
    """Standard deviation of the data, for the input's scale on exploding paths."""

    @property
    def flow(self) -> FlowConfig:
        return FlowConfig(path=self.path, timesteps=self.timesteps, sigma_data=self.sigma_data)


class Classifier:
    def __init__(self, config: ClassifierConfig, data: ImageDataset, seed: int, device: torch.device):
        if not data.has_labels:
            raise UserError(
                "objective.kind=classifier needs labels: name the key of KEY.json that holds them in data.label"
            )
        self._config, self._flow = config, config.flow
        self._data, self._device, self._channels = data, device, data.channels
        self.network: nn.Module = _build(config, data.channels, seed)

    def _log_probabilities(self, network: nn.Module, batch: ImageBatch, draws: Draws, t_B: Tensor) -> Tensor:
        noise_BCHW = draws.normal("noise", tuple(batch.image_BCHW.shape[1:])).to(batch.image_BCHW.device)
        x_BCHW = self._flow.path.noised(batch.image_BCHW, noise_BCHW, t_B)
        return network(x_BCHW * self._flow.input_scale(t_B, x_BCHW), t_B)

    def loss(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Losses:
        assert batch.label_B is not None
        t_B = self._flow.times(draws, self._data.config.batch_size).to(batch.image_BCHW.device)
        log_p_BK = self._log_probabilities(network, batch, draws, t_B)
        loss_B = F.nll_loss(log_p_BK, batch.label_B, reduction="none")
        accuracy = (log_p_BK.argmax(1) == batch.label_B).float().mean()
        return Losses(loss_B.mean(), {"accuracy": accuracy.detach()}, by_time=(loss_B, t_B))

    def validate(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Tensor:
        """Cross-entropy of each sample [B], in nats, at one of eight levels of noise by its place in the set."""
        t_B = self._flow.validation_times(batch.positions).to(batch.image_BCHW.device)
        log_p_BK = self._log_probabilities(network, batch, draws, t_B)
        assert batch.label_B is not None
        return F.nll_loss(log_p_BK, batch.label_B, reduction="none")

    def by_level(self, network: nn.Module, limit: int | None = None) -> list[tuple[float, float, float]]:
        """(t, cross-entropy in nats, accuracy) of held-out images at each of eight levels of noise.

        limit: the number of images; all if None.
        """
        first, last = self._flow.span
        rows = []
        for level in range(VALIDATION_LEVELS):
            t, losses, right = first + (last - first) * level / VALIDATION_LEVELS, [], []
            for batch in itertools.islice(self._data.validation(limit or 64), 1 if limit else None):
                batch = batch.to(self._device)
                draws, t_B = NoisePlan(0).at(level, batch.positions), torch.full((len(batch.keys),), t)
                log_p_BK = self._log_probabilities(network, batch, draws, t_B.to(self._device))
                losses.append(F.nll_loss(log_p_BK, batch.label_B, reduction="none"))
                right.append(log_p_BK.argmax(1) == batch.label_B)
            if losses:
                rows.append((t, float(torch.cat(losses).mean()), float(torch.cat(right).float().mean())))
        return rows

    def preview(self, network: nn.Module, limit: int | None = None) -> PIL.Image.Image:
        """Accuracy and cross-entropy of the held-out images over the level of noise."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3), layout="constrained")
        rows, columns = self.by_level(network, limit), ("accuracy", "cross-entropy, nats")
        for number, (axes, name) in enumerate(zip(figure.subplots(1, 2), columns, strict=True)):
            axes.plot([row[0] for row in rows], [(row[2], row[1])[number] for row in rows], marker="o")
            axes.set(xlabel="t", ylabel=name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return PIL.Image.open(buffer)

    def metadata(self) -> dict[str, Any]:
        return {
            "kind": self._config.kind,
            "objective": self._config.model_dump(mode="json"),
            "channels": self._channels,
        }


def _build(config: ClassifierConfig, channels: int, seed: int) -> NoisyClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NoisyClassifier(config.model, channels, config.classes)


def load_classifier(
    run: Path, device: torch.device, step: int | None = None
) -> tuple[LogProbabilities, ClassifierConfig]:
    """log p(y | x_t) by the averaged network of snapshot `step` (default: the newest), differentiable in x_t, and its
    configuration, whose path must be that of the guided model.

    Raises UserError where `run` has no snapshot, or is of another kind.
    """
    snap = snapshot.read(run, step)
    if snap.metadata["kind"] != "classifier":
        raise UserError(f"{run}: a run of kind {snap.metadata['kind']!r} is no classifier")
    config: ClassifierConfig = snap.part(ClassifierConfig, "objective")
    network = _build(config, snap.part(int, "channels"), seed=0)
    snap.fill(network)
    network = network.to(device).eval().requires_grad_(False)
    flow = config.flow

    def log_probabilities(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return network(x_BCHW * flow.input_scale(t_B, x_BCHW), t_B)

    return log_probabilities, config
