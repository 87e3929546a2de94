"""Export of a run's averaged weights: an MM-DiT as safetensors with its configuration, an autoencoder as diffusers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autoencoders.codec import Affine
from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import ImageData, ImageDataset
from stack.files import publish
from stack.flow.noise import NoisePlan
from stack.train import autoencoder, snapshot
from stack.train.autoencoder import AutoencoderConfig
from stack.train.recipe import TrainConfig


def export(
    run: Path, out: Path, step: int | None, num_samples: int, replace: bool, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Write snapshot `step` (default: the newest) of `run` into the folder `out`, which appears by rename.

    UserError where `out` exists and is not to be replaced.

    num_samples: images over which an autoencoder's latent statistics are measured.  overrides: of the run's
    configuration, dotted. Returns facts to show.
    """
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: name another folder, or give --replace")
    snap = snapshot.read(run, step)
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if snap.metadata["kind"] == "autoencoder":
        config = configuration.load(TrainConfig, run / "config.yaml", overrides)
        facts = _autoencoder(config, snap, partial, num_samples)
    else:
        facts = _mmdit(snap, partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return facts


def _mmdit(snap: snapshot.Snapshot, out: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    save_file(snap.weights, out / "model.safetensors", metadata={"config": json.dumps(snap.metadata)})
    (out / "config.json").write_text(json.dumps(snap.metadata, indent=1))
    return {"step": snap.step, "parameters": sum(w.numel() for w in snap.weights.values())}


@torch.inference_mode()
def _autoencoder(config: TrainConfig, snap: snapshot.Snapshot, out: Path, num_samples: int) -> dict[str, Any]:
    """A diffusers folder whose scale and shift bring latents to mean 0 and variance 1 over all channels."""
    assert isinstance(config.data, ImageData)
    codec = autoencoder.build(AutoencoderConfig(**snap.metadata["autoencoder"]), seed=0)
    codec.load_state_dict(snap.weights)
    codec = codec.to(dist.device()).eval()
    data = ImageDataset(config.data, config.run.seed)
    steps = -(-num_samples // config.data.batch_size)
    positions, total, squares = 0, torch.zeros(codec.channels), torch.zeros(codec.channels)
    total, squares = total.double(), squares.double()
    noise = NoisePlan(config.run.seed)
    for batch in data.loader(0, steps, 0, 1, 1):
        mean, logvar = codec.encode(batch.image_BCHW.to(dist.device()))
        eps = noise.at(batch.step, batch.positions).normal("posterior", tuple(mean.shape[1:]))
        z_CX = (mean.cpu() + torch.exp(0.5 * logvar.cpu()) * eps).double().transpose(0, 1).flatten(1)
        positions += z_CX.shape[1]
        total, squares = total + z_CX.sum(1), squares + z_CX.square().sum(1)
    mean_C = total / positions
    std_C = (squares / positions - mean_C.square()).sqrt()
    shift = float(mean_C.mean())
    scale = float((squares.sum() / (positions * codec.channels) - shift**2).rsqrt())
    codec.save(out, Affine(scale, shift))
    facts = {
        "step": snap.step,
        "images": steps * config.data.batch_size,
        "scale": scale,
        "shift": shift,
        "mean": mean_C.tolist(),
        "std": std_C.tolist(),
    }
    with publish(out / "latent_statistics.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    return facts
