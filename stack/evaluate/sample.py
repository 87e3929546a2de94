"""A run's sampler, from its snapshot: no DeepSpeed, no data set; and samples of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoencoders.codec import Codec, to_uint8
from stack import dist
from stack.config import UserError
from stack.data.images import DecodeError, to_pixels
from stack.flow.draw import GuidedConfig
from stack.flow.guidance import ClassifierFn
from stack.flow.noise import NoisePlan
from stack.flow.process import FlowConfig
from stack.models import captioned
from stack.models.captioned import CaptionNetwork
from stack.text.conditioning import EncodedText
from stack.text.encoders import TextEncoders
from stack.train import class_to_image
from stack.train.class_to_image import ClassToImageConfig
from stack.train.sampler import Sampler, SamplerConfig
from stack.train.snapshot import Snapshot
from stack.train.space import Space
from stack.train.text_to_image import check_encoders

BATCH = 64


def load_sampler(snap: Snapshot, device: torch.device, weak: Snapshot | None = None) -> tuple[Sampler, TextEncoders]:
    """The averaged network of a snapshot with the encoders and codec it was trained on.

    weak: the run's snapshot that autoguidance leads away from.
    Raises UserError where an encoder is not the one of the training.
    """
    if snap.metadata["kind"] != "text_to_image":
        raise UserError(f"{snap.path}: a run of kind {snap.metadata['kind']!r} does not draw images from prompts")
    text = check_encoders(snap)

    def averaged(of: Snapshot) -> CaptionNetwork:
        network = captioned.build(of.part(captioned.NetworkConfig, "model"), codec.channels)
        of.fill(network)
        return network.to(device).eval()

    codec = Codec.load(snap.part(str, "autoencoder")).to(device)
    flow, worse = snap.part(FlowConfig, "flow"), None if weak is None else averaged(weak)
    return Sampler(averaged(snap), codec, text.pad, flow, worse), TextEncoders(text, device)


def draw_labels(
    snap: Snapshot,
    labels: Sequence[int],
    sampling: Sequence[str],
    seed: int,
    weak: Snapshot | None = None,
    starts: Sequence[Path] = (),
) -> list[np.ndarray]:
    """Images of class labels, uint8 [height, width, 3], by the averaged network of a snapshot.

    Image i of `seed` is of labels[i], and begins with the image file starts[i] where the run leads from images.
    sampling: dotted overrides of the run's preview.  weak: as in `load_sampler`.
    Raises UserError where the run has no such labels, begins with the other, or cannot be guided so.
    """
    device = dist.device()
    network, config, space = class_to_image.of_snapshot(snap, device)
    how = class_to_image.sampling_of(config, sampling)
    if (config.coupling.kind == "paired") != bool(starts):
        begins = "noise, not with images" if starts else "images, not with noise: name them with --image"
        raise UserError(f"{snap.path}: begins with {begins}")
    if wrong := [label for label in labels if not 0 <= label < max(config.classes, 1)]:
        raise UserError(f"label {wrong[0]}: {snap.path} has labels from 0 to {max(config.classes, 1) - 1}")
    worse = None if weak is None else class_to_image.of_snapshot(weak, device).network
    classifier = class_to_image.classifier_of(how, config, space.image_channels, device)
    first = [_pixels(path, space.image_sides[0], space.image_channels) for path in starts]
    batches = draw_classes(network, config, space, labels, how, seed, classifier, worse, first)
    return [image for _, images in batches for image in images]


def draw_classes(
    network: nn.Module,
    config: ClassToImageConfig,
    space: Space,
    labels: Sequence[int],
    how: GuidedConfig,
    seed: int,
    classifier: ClassifierFn | None = None,
    weak: nn.Module | None = None,
    starts: Sequence[Tensor] = (),
) -> Iterator[tuple[range, list[np.ndarray]]]:
    """Batches of (rows, images), as `draw`: image i of `seed` is of labels[i], on the networks' device.

    starts: the image that image i begins with, [C, H, W] in −1…1, instead of noise.
    """
    device = next(network.parameters()).device
    for start in range(0, len(labels), BATCH):
        rows = range(start, min(start + BATCH, len(labels)))
        first_BCHW = torch.stack([starts[row] for row in rows]) if starts else None
        noise = space.beginning(NoisePlan(seed).at(0, rows), device, first_BCHW)
        label_B = torch.tensor([labels[row] for row in rows], device=device)
        with torch.inference_mode():
            x_BCHW = class_to_image.sample(network, config, label_B, noise, how, classifier, weak)
            image_BCHW = space.leave(x_BCHW.float())
        yield rows, list(to_uint8(image_BCHW).numpy())


def _pixels(path: Path, side: tuple[int, int], channels: int) -> Tensor:
    try:
        return to_pixels(path.read_bytes(), side, channels)
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from None


def draw(
    sampler: Sampler, texts: Sequence[EncodedText], sizes: Sequence[tuple[int, int]], config: SamplerConfig, seed: int
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Batches of (rows, images): image i of `seed` is drawn for texts[i], at sizes[i] = (width, height)."""
    for size in sorted(set(sizes)):
        alike = [row for row, of_row in enumerate(sizes) if of_row == size]
        for start in range(0, len(alike), config.batch_size):
            rows = alike[start : start + config.batch_size]
            yield rows, sampler.sample([texts[row] for row in rows], size, config, rows, seed)
