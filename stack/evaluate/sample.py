"""A run's sampler, from its snapshot: no DeepSpeed, no data set; and samples of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from autoencoders.codec import Codec
from stack.config import UserError
from stack.flow.process import FlowConfig
from stack.models import captioned
from stack.models.captioned import CaptionNetwork
from stack.text.conditioning import EncodedText
from stack.text.encoders import TextEncoders
from stack.train import snapshot
from stack.train.sampler import Sampler, SamplerConfig
from stack.train.text_to_image import check_encoders


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


def draw(
    sampler: Sampler, texts: Sequence[EncodedText], sizes: Sequence[tuple[int, int]], config: SamplerConfig, seed: int
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Batches of (rows, images): image i of `seed` is drawn for texts[i], at sizes[i] = (width, height)."""
    for size in sorted(set(sizes)):
        alike = [row for row, of_row in enumerate(sizes) if of_row == size]
        for start in range(0, len(alike), config.batch_size):
            rows = alike[start : start + config.batch_size]
            yield rows, sampler.sample([texts[row] for row in rows], size, config, rows, seed)
