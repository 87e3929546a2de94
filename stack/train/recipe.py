"""A training run's whole configuration, and the objects it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from stack.config import Config, Seed, UserError
from stack.data.dataset import Accept, ImageData, ImageDataset, LatentData, LatentDataset, ShardData
from stack.data.safety import RejectLog
from stack.log import LogConfig
from stack.models import compute
from stack.models.compute import ComputeConfig
from stack.models.mmdit import MMDiTConfig
from stack.parallel.ema import EmaConfig
from stack.parallel.engine import OptimConfig, ParallelConfig
from stack.train.autoencoder import AutoencoderConfig, AutoencoderObjective
from stack.train.checkpoint import CheckpointConfig
from stack.train.class_to_image import ClassToImage, ClassToImageConfig
from stack.train.classifier import Classifier, ClassifierConfig
from stack.train.objective import Objective
from stack.train.schedule import ScheduleConfig
from stack.train.snapshot import SnapshotConfig
from stack.train.text_to_image import TextToImage, TextToImageConfig


class RunConfig(Config):
    dir: Path
    """The run's folder: config, metrics, checkpoints, snapshots, samples."""
    seed: Seed = 0
    max_nonfinite: PositiveInt = 20
    """Steps in a row with a non-finite gradient that end the run."""
    accept_data: str | None = None
    """The fingerprint of other data with which a run may resume than those of its checkpoint; the error that refuses
    them prints it. It accepts no data but these."""
    watchdog_s: PositiveFloat = 900
    """Seconds without a step after which a rank writes its stacks and ends: more than a snapshot takes, or the write
    of a checkpoint."""


class TrainConfig(Config):
    run: RunConfig
    data: Annotated[LatentData | ImageData, Field(discriminator="kind")]
    objective: Annotated[
        TextToImageConfig | ClassToImageConfig | ClassifierConfig | AutoencoderConfig, Field(discriminator="kind")
    ]
    init: dict[Literal["from"], Path] = Field(default={})
    """from: weights to begin with, in any format that `stack.models.convert.load` reads; else drawn from run.seed."""
    compute: ComputeConfig = ComputeConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    log: LogConfig = LogConfig()


def check(config: TrainConfig, device: torch.device) -> None:
    """UserError for what a training on `device` refuses before anything is built."""
    objective, parallel = config.objective, config.parallel
    model = objective.model if isinstance(objective, TextToImageConfig) else None
    if not isinstance(model, MMDiTConfig):
        kind = f"objective.model.kind={model.kind}" if model else f"objective.kind={objective.kind}"
        for key, given in (("init.from", config.init), ("compute", config.compute != ComputeConfig())):
            if given:
                raise UserError(f"{key} is for an MM-DiT: {kind} has no use for it")
        return
    if config.compute.compile and parallel.engine == "zero" and parallel.zero_stage == 3:
        raise UserError("compute.compile and parallel.zero_stage=3 exclude each other: each layer is compiled anew")
    compute.check(config.compute, model, device, parallel.dtype(device))


def build(
    config: TrainConfig,
    device: torch.device,
    rejected: RejectLog | None = None,
    begin: bool = False,
    accept: Accept = lambda identity: None,
    previews: bool = False,
) -> tuple[ShardData, Objective]:
    """The data set and the objective. UserError where the two kinds do not go together.

    rejected: where images that cannot be decoded are listed.  begin: whether the weights that `init.from` names are
    read; whoever loads others leaves them out.  accept: is called with the identity of the data before they are used.
    previews: whether previews will be drawn, whose prompts are then read.
    """
    data, objective, seed = config.data, config.objective, config.run.seed
    if isinstance(data, LatentData) and isinstance(objective, TextToImageConfig):
        latents = LatentDataset(data, seed, accept)
        init = config.init.get("from") if begin else None
        return latents, TextToImage(objective, latents, seed, device, init, previews)
    if isinstance(data, ImageData) and not isinstance(objective, TextToImageConfig):
        images = ImageDataset(data, seed, rejected, getattr(objective, "classes", None) or None, accept)
        if isinstance(objective, AutoencoderConfig):
            return images, AutoencoderObjective(objective, images, seed, device)
        if isinstance(objective, ClassifierConfig):
            return images, Classifier(objective, images, seed, device)
        return images, ClassToImage(objective, images, seed, device)
    raise UserError(f"objective.kind={objective.kind} does not train on data.kind={data.kind}")
