"""A run's sampler, from its snapshot: no DeepSpeed, no data set."""

from __future__ import annotations

from pathlib import Path

import torch

from autoencoders.codec import Codec
from stack.config import UserError
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.encoders import TextEncoders
from stack.train import snapshot
from stack.train.rectified_flow import check_encoders
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
    text = check_encoders(snap)
    network = MMDiT(MMDiTConfig(**snap.metadata["model"]))
    network.load_state_dict(snap.weights)
    network = network.to(device).eval()
    codec = Codec.load(snap.metadata["autoencoder"]).to(device)
    return Sampler(network, codec, text.pad), TextEncoders(text, device), snap
