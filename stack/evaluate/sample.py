"""A run's sampler, from its snapshot: no DeepSpeed, no data set; and samples of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from autoencoders.codec import Codec, to_uint8
from stack import dist
from stack.config import UserError, load
from stack.flow.noise import Draws, NoisePlan
from stack.flow.process import FlowConfig
from stack.models import captioned
from stack.models.captioned import CaptionNetwork
from stack.text.conditioning import EncodedText
from stack.text.encoders import TextEncoders
from stack.train import class_to_image, snapshot
from stack.train.sampler import Sampler, SamplerConfig
from stack.train.text_to_image import check_encoders

BATCH = 64


def load_sampler(
    run: Path, device: torch.device, step: int | None = None, weak_step: int | None = None
) -> tuple[Sampler, TextEncoders, snapshot.Snapshot]:
    """The averaged network of snapshot `step` (default: the newest) with the encoders and codec it was trained on.

    weak_step: the snapshot that autoguidance leads away from.

    Raises UserError where an encoder is not the one of the training.
    """
    snap = snapshot.read(run, step)
    if snap.metadata["kind"] != "text_to_image":
        raise UserError(f"{run}: a run of kind {snap.metadata['kind']!r} does not draw images from prompts")
    text = check_encoders(snap)

    def averaged(of: snapshot.Snapshot) -> CaptionNetwork:
        network = captioned.build(captioned.described(of.metadata["model"]), codec.channels)
        network.load_state_dict(of.weights)
        return network.to(device).eval()

    codec = Codec.load(snap.metadata["autoencoder"]).to(device)
    network = averaged(snap)
    weak = None if weak_step is None else averaged(snapshot.read(run, weak_step))
    flow = FlowConfig(**snap.metadata["flow"])
    return Sampler(network, codec, text.pad, flow, weak), TextEncoders(text, device), snap


def draw_labels(
    run: Path, labels: Sequence[int], sampling: Sequence[str], seed: int, step: int | None, weak_step: int | None
) -> tuple[list[np.ndarray], int]:
    """Images of class labels, uint8 [height, width, 3], by the averaged network of snapshot `step`, and its step.

    Image i of `seed` is of labels[i]. sampling: dotted overrides of the run's preview.
    Raises UserError where the run has no such labels, or begins with images instead of noise.
    """
    device = dist.device()
    network, config = class_to_image.load(run, device, step)
    how = load(class_to_image.PreviewConfig, config.preview.model_dump(), sampling)
    if config.coupling.kind == "paired":
        raise UserError(f"{run}: begins with images, not with noise: see stack.train.class_to_image.sample")
    if wrong := [label for label in labels if not 0 <= label < max(config.classes, 1)]:
        raise UserError(f"label {wrong[0]}: {run} has labels from 0 to {max(config.classes, 1) - 1}")
    weak = None if weak_step is None else class_to_image.load(run, device, weak_step)[0]
    snap = snapshot.read(run, step)
    classifier = class_to_image.classifier_of(how.classifier, config, snap.metadata["channels"], device)
    (width, height), images = snap.metadata["sides"][0], []
    for start in range(0, len(labels), BATCH):
        rows = range(start, min(start + BATCH, len(labels)))
        draws = NoisePlan(seed).at(0, rows)

        def noise(stream: str, draws: Draws = draws) -> torch.Tensor:
            return draws.normal(stream, (snap.metadata["channels"], height, width)).to(device)

        label_B = torch.tensor([labels[row] for row in rows], device=device)
        with torch.inference_mode():
            image_BCHW = class_to_image.sample(network, config, label_B, noise, how, classifier, weak)
        images += list(to_uint8(image_BCHW.clamp(-1, 1).expand(-1, 3, -1, -1)).numpy())
    return images, snap.step


def draw(
    sampler: Sampler, texts: Sequence[EncodedText], sizes: Sequence[tuple[int, int]], config: SamplerConfig, seed: int
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Batches of (rows, images): image i of `seed` is drawn for texts[i], at sizes[i] = (width, height)."""
    for size in sorted(set(sizes)):
        alike = [row for row, of_row in enumerate(sizes) if of_row == size]
        for start in range(0, len(alike), config.batch_size):
            rows = alike[start : start + config.batch_size]
            yield rows, sampler.sample([texts[row] for row in rows], size, config, rows, seed)
