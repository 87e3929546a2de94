"""A run's sampler, from its snapshot: no DeepSpeed, no data set."""

from __future__ import annotations

from pathlib import Path

import torch

from autoencoders.codec import Codec
from stack.config import UserError
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.encoders import TextConfig, TextEncoders
from stack.train import snapshot
from stack.train.rectified_flow import encoder_fingerprints
from stack.train.sampler import Sampler


def load_sampler(
    run: Path, device: torch.device, step: int | None = None
) -> tuple[Sampler, TextEncoders, snapshot.Snapshot]:
    """The averaged network of snapshot `step` (default: the newest) with the encoders and codec it was trained on.

    Raises UserError where an encoder is not the one of the training.
    """
    snap = snapshot.read(run, step)
    if snap.metadata["kind"] != "rectified_flow":
        raise UserError(f"{run}: a run of kind {snap.metadata['kind']!r} does not draw images from prompts")
    text, autoencoder = TextConfig(**snap.metadata["text"]), snap.metadata["autoencoder"]
    for name, value in encoder_fingerprints(text, autoencoder).items():
        if snap.metadata["encoders"].get(name) != value:
            raise UserError(
                f"{snap.path}: trained with {name} {snap.metadata['encoders'].get(name)}, found {value}: "
                "restore the encoder that made the training data"
            )
    network = MMDiT(MMDiTConfig(**snap.metadata["model"]))
    network.load_state_dict(snap.weights)
    network = network.to(device).eval()
    return Sampler(network, Codec.load(autoencoder).to(device), text.pad), TextEncoders(text, device), snap
