"""Images from class labels, in pixels or latents: a DiT or a U-Net on any objective of `stack.flow.process`.

Shapes: B batch · C channels · H W height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from autoencoders.codec import to_uint8
from stack import config as configuration
from stack.config import Location, Seed, UserError
from stack.data.dataset import ImageBatch, ImageDataset
from stack.flow.draw import GuidedConfig, draw
from stack.flow.guidance import Branches, ClassifierFn, Guided, branches, classifier_gradient
from stack.flow.likelihood import Bits, LikelihoodConfig, bits_per_dim, ddpm_bound
from stack.flow.noise import Draws, NoisePlan
from stack.flow.path import DDPM
from stack.flow.process import Example, FlowConfig, NetworkFn
from stack.flow.samplers import NoiseFn
from stack.models import labelled
from stack.models.labelled import LabelNetwork, NetworkConfig
from stack.train import snapshot
from stack.train.classifier import load_classifier
from stack.train.objective import Losses
from stack.train.pictures import contact_sheet
from stack.train.space import PAIRED, Space
from stack.train.text_to_image import Probability


class PreviewConfig(GuidedConfig):
    count: PositiveInt = 40
    """Samples on the sheet, whose labels take turns."""
    seed: Seed = 0
    classifier: Path | None = None
    """Run of the noisy classifier that guidance.classifier scales."""


class ClassToImageConfig(FlowConfig):
    kind: Literal["class_to_image"] = "class_to_image"
    model: NetworkConfig
    classes: NonNegativeInt
    """Labels run from 0 to classes − 1; 0: no labels, an unconditional model."""
    dropout: Probability = 0.1
    """Share of the samples whose label is dropped, for classifier-free guidance (arXiv 2207.12598)."""
    autoencoder: Location | None = None
    """Frozen, a folder or hub id: the flow is of its latents, into which each batch is encoded, instead of pixels."""
    preview: PreviewConfig = PreviewConfig()


class ClassToImage:
    """What stands at t = 1 is noise, or with the coupling `paired` the sample's second image."""

    def __init__(self, config: ClassToImageConfig, data: ImageDataset, seed: int, device: torch.device):
        _check(config, data)
        self._config, self._batch_size, self._device = config, data.config.batch_size, device
        self.space = Space(config.autoencoder, data.channels, data.sides, device)
        network = labelled.build(config.model, self.space.channels, self.space.sides, config.classes, seed)
        self.network: nn.Module = network
        self._classifier = classifier_of(config.preview, config, data.channels, device)
        self._shown = next(iter(data.validation(config.preview.count)), None) if _paired(config) else None
        if _paired(config) and self._shown is None:
            raise UserError("objective.coupling.kind=paired is shown on held-out pairs, and there are none: raise "
                            "data.validation_share")  # fmt: skip

    def _label_B(self, batch: ImageBatch) -> Tensor:
        none_B = torch.full((len(batch.keys),), self._config.classes, device=batch.image_BCHW.device)
        return batch.label_B if self._config.classes and batch.label_B is not None else none_B

    def _ends(self, batch: ImageBatch, draws: Draws, batch_size: int | None) -> tuple[Tensor, Tensor]:
        """What stands at t = 0 and at t = 1, [B, C, H, W] each."""
        x0_BCHW = self.space.enter(batch.image_BCHW, draws)
        if batch.paired_BCHW is not None:
            return x0_BCHW, self.space.enter(batch.paired_BCHW, draws, PAIRED)
        return x0_BCHW, self._config.coupling.noise(x0_BCHW, draws, batch_size)

    def _loss_B(self, network: nn.Module, example: Example, label_B: Tensor) -> Tensor:
        scaled = example.x_t * self._config.input_scale(example.t_B, example.x_t)
        return self._config.loss_B(network(scaled, example.t_B, label_B), example)

    def loss(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Losses:
        config, device = self._config, batch.image_BCHW.device
        t_B = config.times(draws, self._batch_size).to(device)
        dropped_B = (draws.uniform("keep_label") < config.dropout).to(device)
        label_B = self._label_B(batch).masked_fill(dropped_B, config.classes)
        example = config.example(*self._ends(batch, draws, self._batch_size), t_B)
        loss_B = self._loss_B(network, example, label_B)
        return Losses(loss_B.mean(), by_time=(loss_B, t_B))

    def validate(self, network: nn.Module, batch: ImageBatch, draws: Draws) -> Tensor:
        example = self._config.validation_example(*self._ends(batch, draws, None), batch.positions)
        return self._loss_B(network, example, self._label_B(batch))

    def bits_per_dim(
        self, network: nn.Module, batch: ImageBatch, draws: Draws, how: LikelihoodConfig, num_steps: int
    ) -> Bits:
        """Of the batch's images under their labels, see `stack.flow.likelihood.bits_per_dim`. Of pixels only."""
        config, velocity = self._config, self._config.velocity_fn(self._predictor(network, batch))
        return bits_per_dim(velocity, config.path, batch.image_BCHW, config.grid(num_steps), draws, how)

    def ddpm_bound(self, network: nn.Module, batch: ImageBatch, draws: Draws, levels: int) -> Bits:
        """As `bits_per_dim`, by `stack.flow.likelihood.ddpm_bound`. ValueError unless the path is DDPM's."""
        config = self._config
        if not isinstance(config.path, DDPM):
            raise ValueError(f"the variational bound is of path.kind=ddpm, got {config.path.kind}")
        estimate = config.estimate_fn(self._predictor(network, batch))
        return ddpm_bound(estimate, config.path, batch.image_BCHW, draws, levels)

    def _predictor(self, network: nn.Module, batch: ImageBatch) -> NetworkFn:
        label_B = self._label_B(batch)
        return self._config.predictor(lambda x_BCHW, t_B: network(x_BCHW, t_B, label_B))

    def preview(self, network: nn.Module, limit: int | None = None) -> Image:
        """Samples, a column per class as far as there is room; of paired data each under the image it begins with."""
        config, space = self._config, self.space
        if self._shown is not None:
            starts, label_B = self._shown.paired_BCHW, self._label_B(self._shown)[:limit]
            starts = None if starts is None else starts[:limit]
        else:
            starts, label_B = None, torch.arange(config.preview.count)[:limit] % max(config.classes, 1)
        noise = space.beginning(NoisePlan(config.preview.seed).at(0, range(len(label_B))), self._device, starts)
        x_BCHW = sample(network, config, label_B.to(self._device), noise, config.preview, self._classifier)
        image_BCHW = space.leave(x_BCHW.float())
        columns = min(config.classes or 8, 10)
        if starts is not None:
            columns = min(len(starts), 8)
            rows = zip(starts.split(columns), image_BCHW.cpu().split(columns), strict=True)
            image_BCHW = torch.cat([half for row in rows for half in row])
        return contact_sheet(list(to_uint8(image_BCHW).numpy()), columns=columns, cell=64)

    def metadata(self) -> dict[str, Any]:
        return {
            "kind": self._config.kind,
            "objective": self._config.model_dump(mode="json"),
            "channels": self.space.image_channels,
            "sides": self.space.image_sides,
            **({"encoders": {"autoencoder": self.space.autoencoder}} if self.space.autoencoder else {}),
        }


def classifier_of(
    how: PreviewConfig, config: ClassToImageConfig, channels: int, device: torch.device
) -> ClassifierFn | None:
    """The noisy classifier that guides, if one does; UserError where it knows another path, or other images."""
    run = how.classifier
    if run is None or how.guidance.classifier == 0:
        return None
    log_probabilities, trained = load_classifier(run, device)
    if trained.path != config.path:
        raise UserError(f"{run}: a classifier of the path {trained.path}, and objective.path is {config.path}")
    seen = snapshot.read(run).part(int, "channels")
    if seen != channels or trained.classes < config.classes:
        raise UserError(
            f"{run}: a classifier of {trained.classes} classes in images of {seen} channels, wanted are "
            f"{config.classes} and {channels}"
        )
    return log_probabilities


def _paired(config: ClassToImageConfig) -> bool:
    return config.coupling.kind == "paired"


def _check(config: ClassToImageConfig, data: ImageDataset) -> None:
    """UserError where the objective, its data and its preview do not go together: now, not at the first snapshot."""
    config.preview.check(config)
    check_guidance(config.preview, config)
    if config.preview.guidance.autoguidance != 1:
        raise UserError("objective.preview.guidance.autoguidance: a training has no weaker network to be guided by")
    if config.classes and not data.has_labels:
        raise UserError(
            f"objective.classes={config.classes} needs labels: name the key of KEY.json that holds them in data.label"
        )
    if _paired(config) != data.has_pairs:
        raise UserError("objective.coupling.kind=paired and data.paired go together: give both or neither")
    taken_for_normal = config.path.kind != "linear" or config.prediction == "score" or config.weight.kind == "elbo"
    if _paired(config) and taken_for_normal:
        raise UserError(
            f"objective.coupling.kind=paired has images in the place of noise: path.kind={config.path.kind} with "
            f"prediction={config.prediction} and weight.kind={config.weight.kind} takes it for normal; use "
            "path.kind=linear, prediction=velocity and weight.kind=prediction"
        )


def check_guidance(how: PreviewConfig, config: ClassToImageConfig) -> None:
    """UserError where the objective has trained nothing that guidance would take away, or a classifier is not named."""
    if how.guidance.scale != 1 and not (config.classes and config.dropout):
        raise UserError(
            f"guidance.scale={how.guidance.scale} needs labels, and some of them dropped: objective.classes is "
            f"{config.classes}, objective.dropout {config.dropout}"
        )
    if how.guidance.classifier != 0 and config.autoencoder is not None:
        raise UserError("guidance.classifier looks at pixels, and objective.autoencoder makes this a flow of latents")
    if how.guidance.classifier != 0 and how.classifier is None:
        raise UserError("guidance.classifier needs a classifier's run: name it in `classifier`, beside `guidance`")


def sample(
    network: nn.Module,
    config: ClassToImageConfig,
    label_B: Tensor,
    noise: NoiseFn,
    how: GuidedConfig,
    classifier: ClassifierFn | None = None,
    weak: nn.Module | None = None,
) -> Tensor:
    """Images of the labels, or their latents, [B, C, H, W]; `Space.leave` makes pixels of both.

    noise: as of `stack.flow.draw.draw`, and as `Space.beginning` gives it.  classifier, weak: what guidance.classifier
    and guidance.autoguidance scale.
    Raises UserError where guidance asks for what is not there.
    """
    none_B = torch.full_like(label_B, config.classes)

    def of(network: nn.Module) -> Branches:
        if not config.classes:
            return Branches(config.predictor(lambda x_BCHW, t_B: network(x_BCHW, t_B, none_B)))
        return branches(config, network, label_B, none_B, torch.cat, how.guidance.batched)

    gradient = None if classifier is None else classifier_gradient(classifier, label_B)
    guided = Guided(how.guidance, config, of(network), None if weak is None else of(weak).conditional, gradient)
    return draw(config, guided, noise, how)


class Trained(NamedTuple):
    """A run's averaged network, its objective, and what its flow is of."""

    network: LabelNetwork
    config: ClassToImageConfig
    space: Space


def load(run: Path, device: torch.device, step: int | None = None) -> Trained:
    """Of snapshot `step` (default: the newest).

    Raises UserError where `run` has none, is of another kind, or its autoencoder is another one now.
    """
    return of_snapshot(snapshot.read(run, step), device)


def sampling_of(config: ClassToImageConfig, overrides: Sequence[str]) -> PreviewConfig:
    """The run's preview with dotted overrides; UserError where those do not fit, or name what a command says itself."""
    how = configuration.load(PreviewConfig, config.preview.model_dump(), overrides)
    if (how.count, how.seed) != (config.preview.count, config.preview.seed):
        raise UserError("count and seed are of the training's sheet: this command has its own options for them")
    how.check(config)
    check_guidance(how, config)
    return how


def of_snapshot(snap: snapshot.Snapshot, device: torch.device) -> Trained:
    """As `load`."""
    if snap.metadata["kind"] != "class_to_image":
        raise UserError(f"{snap.path}: a run of kind {snap.metadata['kind']!r} has no network that draws classes")
    config: ClassToImageConfig = snap.part(ClassToImageConfig, "objective")
    space = Space(config.autoencoder, snap.part(int, "channels"), snap.part(list[tuple[int, int]], "sides"), device)
    known = snap.part(dict[str, str], "encoders") if "encoders" in snap.metadata else {}
    if space.autoencoder != known.get("autoencoder"):
        raise UserError(f"{config.autoencoder}: not the autoencoder with which {snap.path} was trained")
    network = labelled.build(config.model, space.channels, space.sides, config.classes, seed=0)
    snap.fill(network)
    return Trained(network.to(device).eval(), config, space)
