"""Evaluation of a run's snapshots: validation loss, FID, KID and CLIP score of samples, accuracy on drawn scenes."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator
from torch import nn

from autoencoders.codec import Codec
from stack import config as configuration
from stack import dist
from stack.config import Config, Seed, UserError
from stack.data.dataset import ImageDataset, LatentDataset
from stack.data.synthetic import evaluation_prompts, prompt
from stack.evaluate import metrics, results
from stack.evaluate.metrics import Inception
from stack.evaluate.results import Results, mark_of
from stack.evaluate.sample import draw, draw_classes
from stack.evaluate.scenes import judge, shares
from stack.files import publish
from stack.flow.likelihood import Bits, LikelihoodConfig
from stack.flow.noise import NoisePlan
from stack.log import Tracker, say
from stack.shown import redact
from stack.text.encoders import ClipScore, TextEncoders
from stack.train import loop, origin, recipe, snapshot
from stack.train.class_to_image import (
    ClassToImage,
    ClassToImageConfig,
    classifier_of,
    sampling_of,
)
from stack.train.pictures import contact_sheet
from stack.train.recipe import TrainConfig
from stack.train.sampler import Sampler, SamplerConfig
from stack.train.schedule import steps_of
from stack.train.text_to_image import TextToImage, TextToImageConfig

MAX_SHOWN = 64
"""Samples on a contact sheet."""


class NllConfig(LikelihoodConfig):
    """Negative log-likelihood of held-out images, for models of pixels."""

    images: NonNegativeInt = 0
    steps: PositiveInt = 50
    """Of Heun's method along the probability-flow ODE."""
    bound: bool = False
    """DDPM's variational bound beside it, which asks the network once a step of the path."""

    @model_validator(mode="after")
    def _bounds_images(self) -> NllConfig:
        if self.bound and not self.images:
            raise ValueError("bound is of images: give their number, --nll N")
        return self


class EvaluationConfig(Config):
    """What is measured. Paths are local: nothing is fetched."""

    scenes: NonNegativeInt = 0
    """Samples for each of one and two drawn shapes, seen and held-out combinations."""
    samples: NonNegativeInt = 0
    """Samples for the captions of the held-out samples, one after another and from the first again, or of a run's
    classes in turns."""
    inception: Path | None = None
    """InceptionV3's weights: FID and KID of the samples."""
    reference: Path | None = None
    """Folder of images that they are compared with; else the held-out images, of pre-encoded data as decoded."""
    clip: Path | None = None
    """Folder of a CLIP as open_clip saves it: CLIP score of the samples."""
    nll: NllConfig = NllConfig()
    sampling: tuple[str, ...] = ()
    """Dotted overrides of the sampler of the run's own sample grids: steps=10, guidance.scale=2."""
    seed: Seed = 0
    batch_size: PositiveInt = 64

    @field_validator("inception", "reference", "clip")
    @classmethod
    def _from_anywhere(cls, path: Path | None) -> Path | None:
        return None if path is None else path.resolve()

    @model_validator(mode="after")
    def _measures_what_it_draws(self) -> EvaluationConfig:
        if self.samples == 1 or (self.samples > 0) != (self.inception is not None or self.clip is not None):
            raise ValueError("samples (2 or more) and what measures them, inception or clip, go together")
        if self.reference is not None and self.inception is None:
            raise ValueError("reference is for inception")
        return self


class Evaluator:
    """The snapshots of one run, measured one by one: data, networks and what is compared with are built once.

    overrides: of the run's configuration, dotted.
    Raises UserError where the run or what `asked` names is missing or does not fit.
    """

    def __init__(self, run: Path, asked: EvaluationConfig, overrides: Sequence[str] = ()):
        if not (run / "config.yaml").exists():
            raise UserError(f"{run}: no config.yaml; not a run folder")
        self._origin = origin.of(run)  # before the configuration, which a training writes before it
        self._origins: dict[int, str | None] = {}
        self._read: set[Path] = set()
        self.run, self.leases = run, snapshot.leases(run)
        self.results = Results(run, self.leases)
        self._asked, self._device = asked, dist.device()
        self._settings = asked.model_dump(mode="json", exclude={"batch_size"})
        self._settings["overrides"] = [redact(override) for override in overrides]
        self._trained = configuration.load(TrainConfig, run / "config.yaml", overrides)
        self._data, self._objective = recipe.build(self._trained, self._device)
        self._tracker: Tracker | None = None
        objective = self._trained.objective
        classes = pixels = False
        if isinstance(objective, ClassToImageConfig):
            classes = objective.coupling.kind != "paired"
            pixels = classes and objective.autoencoder is None
            self._how = sampling_of(objective, asked.sampling)
        else:
            configuration.load(SamplerConfig, {}, asked.sampling)
        if asked.nll.images and not pixels:
            raise UserError(f"{run}: has no bits a dimension: a class_to_image from noise to pixels has them")
        if asked.nll.bound and not (isinstance(objective, ClassToImageConfig) and objective.path.kind == "ddpm"):
            raise UserError(f"{run}: nll.bound is of a model of pixels with path.kind=ddpm")
        if asked.nll.images and next(iter(self._data.validation(1)), None) is None:
            raise UserError(f"{run}: no samples are held out to take bits a dimension of; see data.validation_share")
        self._inception: Inception | None = None
        self._clip: ClipScore | None = None
        if classes and asked.samples and not (asked.scenes or asked.clip):
            self._prepare_classes()
        elif asked.scenes or asked.samples:
            if isinstance(objective, ClassToImageConfig) and asked.inception is not None and not classes:
                raise UserError(f"{run}: begins with images, and FID and KID are of runs that begin with noise")
            if not isinstance(objective, TextToImageConfig):
                raise UserError(f"{run}: a run of kind {objective.kind!r} does not draw images from prompts")
            self._text = objective.text
            self._codec = Codec.load(objective.autoencoder).to(self._device)
            if asked.scenes:
                self._encoders = TextEncoders(self._text, self._device)
            if asked.samples:
                self._prepare_prompts(asked.samples)

    def _compare_with(self, held_out: Iterable[np.ndarray]) -> None:
        asked = self._asked
        assert asked.inception is not None
        self._inception = Inception(asked.inception, self._device, asked.batch_size)
        self._reference_ND = self._inception.features(
            metrics.images_in(asked.reference) if asked.reference else held_out
        )
        if len(self._reference_ND) < 2:
            raise UserError(f"inception: {asked.reference or 'the held-out share'} has too few images to compare with")

    def _prepare_classes(self) -> None:
        config, how = self._trained.objective, self._how
        assert isinstance(config, ClassToImageConfig)
        assert isinstance(self._data, ImageDataset)
        if how.guidance.autoguidance != 1:
            raise UserError("guidance.autoguidance: an evaluation has no weaker network to be guided by")
        self._classifier = classifier_of(how, config, self._data.channels, self._device)
        self._compare_with(metrics.pixels(self._data, self._asked.batch_size))

    def _prepare_prompts(self, count: int) -> None:
        asked, data = self._asked, self._data
        assert isinstance(data, LatentDataset)
        texts, sizes = metrics.held_out_prompts(data, asked.batch_size)
        if not texts:
            raise UserError(f"{self.run}: no samples are held out to take captions from; see data.validation_share")
        rows = [row % len(texts) for row in range(count)]
        self._texts, self._sizes = [texts[row] for row in rows], [sizes[row] for row in rows]
        if asked.inception is not None:
            self._compare_with(metrics.decoded(data, self._codec, asked.batch_size))
        if asked.clip is not None:
            self._clip = ClipScore(asked.clip, self._device)
            captions = data.validation_captions()
            self._captions = [captions[row] for row in rows]

    def outdated(self) -> bool:
        """Whether another training has begun in the run's folder."""
        return origin.of(self.run) != self._origin

    def snapshot(self, step: int) -> Path:
        return self.run / "snapshots" / f"{step:08d}.safetensors"

    def mark(self, step: int) -> str:
        """The mark of these settings and of the training that wrote snapshot `step`."""
        if step not in self._origins:
            self._origins[step] = origin.of_snapshot(self.snapshot(step))
        return mark_of(self._settings, self._origins[step])

    def measured(self, step: int) -> bool:
        """Whether snapshot `step` has a result with these settings."""
        path = self.results.place(step, self.mark(step))
        if path not in self._read and results.read(path) is not None:
            self._read.add(path)
        return path in self._read and path.exists()

    def lease(self, step: int) -> str:
        """Name of the claim under which snapshot `step` is measured with these settings."""
        return f"{step:08d}.{self.mark(step)}"

    def finished(self) -> bool:
        """Whether the run has come to its last step, which has a snapshot unless the disk was full."""
        last = steps_of(self._trained.schedule.steps, self._trained.data.batch_size)
        return last in snapshot.steps(self.run) or (self.run / "checkpoints" / f"{last:08d}" / "COMPLETE").exists()

    def measure(self, step: int) -> dict[str, Any]:
        """The result of one snapshot, whose lease the caller holds; what was drawn is shown under RUN/eval/STEP/."""
        began = time.monotonic()
        self.results.check_place(step, self.mark(step))
        snap = snapshot.read(self.run, step)
        self._origins[step] = snap.metadata.get("origin")
        if self.outdated():
            raise UserError(f"{self.run}: another training has begun in this folder; start again to evaluate it")
        expected = self._objective.metadata().get("encoders")
        if snap.metadata.get("encoders") != expected:
            raise UserError(f"{snap.path}: trained with encoders {snap.metadata.get('encoders')}, found {expected}")
        network = self._objective.network.to(self._device).eval()
        wanted, found = ({k: x.shape for k, x in one.items()} for one in (network.state_dict(), snap.weights))
        if wanted != found:
            changed = ", ".join(self._settings["overrides"]) or self.run / "config.yaml"
            raise UserError(f"{snap.path}: not the weights of the model that is configured with {changed}")
        network.load_state_dict(snap.weights)
        loss_N = loop.validation_losses(self._objective, network, self._data, self._asked.batch_size)
        if not len(loss_N):
            say(f"{self.run}: no sample is held out: val_loss is null")
        result: dict[str, Any] = {"step": step, "val_loss": float(loss_N.mean())}
        if isinstance(self._objective, TextToImage | ClassToImage):
            result["val_loss_at_t"] = metrics.by_timestep(loss_N)
        if self._asked.nll.images:
            result |= self._likelihood(network)
        if self._asked.samples and isinstance(self._objective, ClassToImage):
            result |= self._classes(step, network)
        elif self._asked.scenes or self._asked.samples:
            values = {key: value for key, value in snap.metadata["sampling"].items() if key != "size"}
            config = configuration.load(SamplerConfig, values, self._asked.sampling)
            sampler = Sampler(network, self._codec, self._text.pad, self._trained.objective)  # type: ignore[arg-type]
            if self._asked.samples:
                drawn = draw(sampler, self._texts, self._sizes, config, self._asked.seed)
                result |= self._samples(step, drawn)
            result |= self._scenes(step, sampler, config) if self._asked.scenes else {}
            result["sampling"] = config.model_dump()
        result |= {"settings": self._settings, "seconds": round(time.monotonic() - began, 1)}
        result |= {"origin": snap.metadata["origin"]} if "origin" in snap.metadata else {}
        finite: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda _: None)  # others become null
        return finite

    def report(self, result: dict[str, Any]) -> None:
        """Publish a result, add it to RUN/eval.jsonl, and log to the training's wandb run where it has one by then."""
        step = result["step"]
        self.results.publish(result, self.mark(step))
        if self._follow(step):
            return
        try:
            self.results.append(result)
        except OSError as error:  # the result itself is safe
            say(f"{self.results.path}: cannot be written now ({error}); a later evaluation adds the line")
        if self._tracker is None:
            self._tracker = Tracker.join(self.run, self._trained.log)
        if self._tracker is not None:
            self._tracker.log(numbers(result))

    def _follow(self, step: int) -> bool:
        """Whether another training moved the snapshot aside while it was measured. If so, its result goes there too."""
        measured = self._origins[step]
        place = self.snapshot(step)
        if place.exists() and origin.of_snapshot(place) == measured:
            return False
        for path in self.run.glob(f"earlier/*/snapshots/{step:08d}.safetensors"):
            if origin.of_snapshot(path) == measured:
                folder = path.parents[1] / "eval" / f"{step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                for file in self.results.place(step, "").parent.glob(f"{self.mark(step)}*"):
                    shutil.move(file, folder / file.name)
                say(f"{path}: moved here while it was evaluated, and so was its result")
                return True
        return False

    def _likelihood(self, network: nn.Module) -> dict[str, Any]:
        """Bits a dimension of held-out images, with the standard error over them, and of the trace alone."""
        asked, objective = self._asked.nll, self._objective
        assert isinstance(objective, ClassToImage)
        found: list[Bits] = []
        bounds: list[torch.Tensor] = []
        left = asked.images
        for batch in self._data.validation(min(self._asked.batch_size, left)):
            draws = NoisePlan(self._asked.seed).at(0, batch.positions)
            on_device = batch.to(self._device)
            found.append(objective.bits_per_dim(network, on_device, draws, asked, asked.steps))
            if asked.bound:
                bounds.append(objective.ddpm_bound(network, on_device, draws, asked.levels).value_B)
            left -= len(batch.positions)
            if left <= 0:
                break
        bits_N, trace_N = (torch.cat(values)[: asked.images].cpu() for values in zip(*found, strict=True))
        result = {
            "bits_per_dim": float(bits_N.mean()),
            "bits_per_dim_error": float(bits_N.std() / len(bits_N) ** 0.5) if len(bits_N) > 1 else math.nan,
            "bits_per_dim_trace_error": float(trace_N.square().mean().sqrt() / len(trace_N) ** 0.5),
            "nll_images": len(bits_N),
        }
        if bounds:
            result["ddpm_bound"] = float(torch.cat(bounds)[: asked.images].mean())
        return result

    def _classes(self, step: int, network: nn.Module) -> dict[str, Any]:
        """Of samples of all classes, which take turns."""
        objective, asked, how = self._trained.objective, self._asked, self._how
        assert isinstance(objective, ClassToImageConfig)
        assert isinstance(self._objective, ClassToImage)
        labels = [row % max(objective.classes, 1) for row in range(asked.samples)]
        drawn = draw_classes(network, objective, self._objective.space, labels, how, asked.seed, self._classifier)
        return {**self._samples(step, drawn), "sampling": how.model_dump(mode="json", exclude={"count", "seed"})}

    def _samples(self, step: int, drawn: Iterable[tuple[Sequence[int], list[np.ndarray]]]) -> dict[str, Any]:
        features: list[torch.Tensor] = []
        scores: list[float] = []
        shown: list[np.ndarray] = []
        for rows, images in drawn:
            shown += images[: MAX_SHOWN - len(shown)]
            if self._inception is not None:
                features.append(self._inception.features(images))
            if self._clip is not None:
                scores += self._clip(images, [self._captions[row] for row in rows])
        self._show(step, "samples", contact_sheet(shown))
        result: dict[str, Any] = {}
        if self._inception is not None:
            drawn_ND = torch.cat(features)
            result["fid"] = metrics.fid(drawn_ND, self._reference_ND)
            result["kid"], result["kid_std"] = metrics.kid(drawn_ND, self._reference_ND)
        if self._clip is not None:
            result["clip_score"] = float(np.mean(scores))
        return result

    def _scenes(self, step: int, sampler: Sampler, config: SamplerConfig) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for held_out in (False, True):
            for num_shapes in (1, 2):
                name = f"{'heldout' if held_out else 'seen'}_{num_shapes}"
                seed = self._asked.seed
                scenes = evaluation_prompts(self._asked.scenes, seed, num_shapes=num_shapes, held_out=held_out)
                texts = self._encoders.encode([prompt(scene) for scene in scenes])
                images: list[Any] = [None] * len(scenes)
                for rows, drawn in draw(sampler, texts, [scene.size for scene in scenes], config, seed):
                    for row, image in zip(rows, drawn, strict=True):
                        images[row] = image
                verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
                result[name] = shares(verdicts)
                marks = [
                    f"{'+' if v.all_right else 'WRONG'} {prompt(s)}" for v, s in zip(verdicts, scenes, strict=True)
                ]
                self._show(step, name, contact_sheet(images, marks, columns=12, cell=96))
                say(f"{name}: {result[name]}")
        return result

    def _show(self, step: int, name: str, sheet: Any) -> None:
        with publish(self.run / "eval" / f"{step:08d}" / f"{self.mark(step)}-{name}.png") as temporary:
            sheet.save(temporary, format="png")

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def evaluate(run: Path, step: int | None, asked: EvaluationConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure snapshot `step` (the newest, if None) anew; its result takes the place of an older one of the same
    settings in RUN/eval.jsonl."""
    step = snapshot.find(run, step)
    with closing(Evaluator(run, asked, overrides)) as evaluator, evaluator.leases.hold(evaluator.lease(step)):
        result = evaluator.measure(step)
        evaluator.report(result)
    return result


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The measurements of a result, flat, as eval/NAME; eval/step is their axis."""
    flat: dict[str, float] = {}
    for name, value in result.items():
        if isinstance(value, dict) and name not in ("sampling", "settings"):
            flat |= {f"eval/{name}/{key}": part for key, part in value.items() if part is not None}
        elif isinstance(value, int | float):
            flat[f"eval/{name}"] = value
    return flat
