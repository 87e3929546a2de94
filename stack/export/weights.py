"""Export of a run's averaged weights: an MM-DiT in this stack's form or others', an autoencoder as diffusers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from autoencoders.codec import Affine
from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import ImageData, ImageDataset
from stack.export import diffusers, single
from stack.export.card import Subject
from stack.files import publish
from stack.flow.noise import NoisePlan
from stack.flow.process import FlowConfig
from stack.models import captioned
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.train import autoencoder, snapshot
from stack.train.autoencoder import AutoencoderConfig
from stack.train.recipe import TrainConfig
from stack.train.text_to_image import check_encoders

Target = Literal["stack", "diffusers", "single"]


def export(
    run: Path,
    out: Path,
    step: int | None,
    num_samples: int,
    replace: bool,
    overrides: Sequence[str] = (),
    target: Target | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write snapshot `step` (default: the newest) of `run` to `out`, which appears by rename.

    UserError where `out` exists and is not to be replaced, and where the target cannot hold the run's model.

    num_samples: images over which an autoencoder's latent statistics are measured.  overrides: of the run's
    configuration, dotted.  target: an MM-DiT's form: "stack" (the default), "diffusers" (a pipeline's folder) or
    "single" (a .safetensors in the authors' names).  dtype: of its weights; float32 if not given.
    Returns facts to show.
    """
    _check_place(run, out, target, replace)
    snap = snapshot.read(run, step)
    if snap.metadata["kind"] == "autoencoder":
        if target is not None or dtype is not None:
            raise UserError(f"{run}: --to and --dtype are for an MM-DiT's run, an autoencoder has one form")
        config = configuration.load(TrainConfig, run / "config.yaml", overrides)
        with _publish_folder(out) as partial:
            return _autoencoder(config, snap, partial, num_samples)
    dtype = dtype or torch.float32
    if target in (None, "stack"):
        with _publish_folder(out) as partial:
            _stack(snap, partial, dtype)
    else:
        subject = _subject(run, snap)
        if target == "single":
            with publish(out) as temporary:
                single.write(subject, temporary, dtype)
        else:
            with _publish_folder(out) as partial:
                diffusers.write(subject, partial, dtype)
    return {"step": snap.step, "parameters": sum(w.numel() for w in snap.weights.values())}


def _check_place(run: Path, out: Path, target: Target | None, replace: bool) -> None:
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: name another, or give --replace")
    if (out.suffix == ".safetensors") != (target == "single"):
        raise UserError(f"{out}: --to single writes a file, whose name ends in .safetensors, any other a folder")
    if out.exists() and out.is_dir() == (target == "single"):
        raise UserError(f"{out} is a {'folder' if out.is_dir() else 'file'}: name another place")
    if run.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the run itself: name another folder")


@contextmanager
def _publish_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; on success it takes its place, with files of mode 0644, else it is removed."""
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stack(snap: snapshot.Snapshot, out: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    weights = {name: weight.to(dtype) for name, weight in snap.weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"config": json.dumps(snap.metadata)})
    (out / "config.json").write_text(json.dumps(snap.metadata, indent=1), encoding="utf-8")


def _subject(run: Path, snap: snapshot.Snapshot) -> Subject:
    """UserError where an encoder is not the one of the training, or the objective not that of SD3 and FLUX."""
    if snap.metadata["kind"] != "text_to_image":
        raise UserError(f"{run}: a run of kind {snap.metadata['kind']!r} has no form of others: export with --to stack")
    flow = snap.part(FlowConfig, "flow")
    if (flow.path.kind, flow.prediction) != ("linear", "velocity"):
        raise UserError(
            f"{run}: trained on path {flow.path.kind} with prediction {flow.prediction}, which no reader of SD3 or "
            "FLUX expects: export with --to stack"
        )
    config = snap.part(captioned.NetworkConfig, "model")
    if not isinstance(config, MMDiTConfig):
        raise UserError(f"{run}: a {config.kind}, and --to diffusers or single write an MM-DiT: export with --to stack")
    with torch.device("meta"):
        network = MMDiT(config)
    snap.fill(network, assign=True)
    samples, described = None, run / "config.yaml"
    if described.is_file():
        samples = snap.step * yaml.safe_load(described.read_text(encoding="utf-8"))["data"]["batch_size"]
    return Subject(run, snap, network, check_encoders(snap), samples)


@torch.inference_mode()
def _autoencoder(config: TrainConfig, snap: snapshot.Snapshot, out: Path, num_samples: int) -> dict[str, Any]:
    """A diffusers folder whose scale and shift bring latents to mean 0 and variance 1 over all channels."""
    assert isinstance(config.data, ImageData)
    codec = autoencoder.build(snap.part(AutoencoderConfig, "autoencoder"), seed=0)
    snap.fill(codec)
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
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts
