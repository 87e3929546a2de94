"""A folder that diffusers' StableDiffusion3Pipeline or FluxPipeline loads, with all that it needs to draw."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from autoencoders.codec import folder_of
from stack.config import UserError
from stack.export import card
from stack.export.card import PIPELINES, Subject
from stack.files import copy_model
from stack.models import convert
from stack.models.keys import Family
from stack.models.tensor_files import STEMS
from stack.text.encoders import TextConfig, folders
from stack.text.folders import write_encoder, write_tokenizer

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def write(subject: Subject, out: Path, dtype: torch.dtype) -> None:
    """The pipeline into the folder `out`, its transformer in `dtype`, the other parts as they were found.

    Raises UserError where the pipeline has no place for the run's encoders, or the format for its network.
    """
    places = _places(subject.text, subject.family)
    convert.save(subject.network, out / "transformer", "diffusers", dtype)
    _write_vae(folder_of(subject.snap.metadata["autoencoder"]), out / "vae")
    index: dict[str, Any] = {
        "_class_name": PIPELINES[subject.family],
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", SCHEDULER],
        "transformer": ["diffusers", convert.CLASSES[subject.family]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    clip_class = "CLIPTextModelWithProjection" if subject.text.clip_projection else "CLIPTextModel"
    sources = folders(subject.text)
    for suffix, name in places.items():
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        if name is None:
            index[encoder] = index[tokenizer] = [None, None]
            continue
        write_encoder(name, sources[name], out / encoder)
        index[encoder] = ["transformers", "T5EncoderModel" if name == "t5" else clip_class]
        index[tokenizer] = ["transformers", write_tokenizer(name, sources[name], out / tokenizer)]
    scheduler = {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": subject.sampling.shift}
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2), encoding="utf-8")
    (out / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    card.write(subject, out)


def _places(text: TextConfig, family: Family) -> dict[str, str | None]:
    """Which encoder stands where: the end of the component's name → ours."""
    pipeline, clips = PIPELINES[family], [name for name in ("clip_l", "clip_g") if getattr(text, name) is not None]
    if family == "sd3":
        if len(clips) < 2:
            raise UserError(f"{pipeline} has two CLIP encoders, this run {clips[0]} alone: export with --to single")
        return {"": "clip_l", "_2": "clip_g", "_3": "t5" if text.t5 is not None else None}
    if len(clips) > 1 or text.t5 is None:
        has = " and ".join(clips + ["t5"] * (text.t5 is not None))
        raise UserError(f"{pipeline} has T5 and one CLIP encoder, this run {has}: export with --to single")
    return {"": clips[0], "_2": "t5"}


def _write_vae(source: Path, out: Path) -> None:
    copy_model(source, out, STEMS[0])
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if config.get("shift_factor") is None:  # the pipelines add it whatever it is
        (out / "config.json").write_text(json.dumps({**config, "shift_factor": 0.0}, indent=2), encoding="utf-8")
