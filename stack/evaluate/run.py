"""Evaluation of a run's snapshot: validation loss on fixed noise, and accuracy on drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stack import config as configuration
from stack import dist
from stack.config import UserError, validate
from stack.data.synthetic import evaluation_prompts, prompt
from stack.evaluate.sample import load_sampler
from stack.evaluate.scenes import judge, shares
from stack.files import publish
from stack.log import say
from stack.train import loop, recipe, snapshot
from stack.train.pictures import contact_sheet
from stack.train.recipe import TrainConfig
from stack.train.sampler import SamplerConfig


def evaluate(
    run: Path,
    step: int | None,
    num_scenes: int,
    sampling: dict[str, Any],
    seed: int,
    batch_size: int,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure one snapshot, append the result to RUN/eval.jsonl, put the judged samples under RUN/eval/STEP/.

    sampling: keys of SamplerConfig that win over those of the run's own sample grids.
    overrides: of the run's configuration, dotted.
    num_scenes: samples for each of one and two shapes, seen and held-out combinations; 0 leaves scenes out.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: no config.yaml; not a run folder")
    trained = configuration.load(TrainConfig, run / "config.yaml", overrides)
    device = dist.device()
    data, objective = recipe.build(trained, device)
    snap = snapshot.read(run, step)
    objective.network.load_state_dict(snap.weights)
    network = objective.network.to(device).eval()
    result: dict[str, Any] = {"step": snap.step, "val_loss": loop.validation_loss(objective, network, data, batch_size)}
    if num_scenes:
        values = {**snap.metadata["sampling"], **sampling}
        del values["size"]
        config = validate(SamplerConfig, values, "options")
        result.update(_scenes(run, snap.step, num_scenes, config, seed, device))
        result["sampling"] = config.model_dump()
    path = run / "eval.jsonl"
    known = path.read_text() if path.exists() else ""
    with publish(path) as temporary:
        temporary.write_text(known + json.dumps(result) + "\n")
    return result


def _scenes(
    run: Path, step: int, num_scenes: int, sampling: SamplerConfig, seed: int, device: torch.device
) -> dict[str, Any]:
    sampler, encoders, _ = load_sampler(run, device, step)
    result: dict[str, Any] = {}
    for held_out in (False, True):
        for num_shapes in (1, 2):
            name = f"{'heldout' if held_out else 'seen'}_{num_shapes}"
            scenes = evaluation_prompts(num_scenes, seed, num_shapes=num_shapes, held_out=held_out)
            images: list[Any] = [None] * len(scenes)
            for size in sorted({scene.size for scene in scenes}):
                rows = [i for i, scene in enumerate(scenes) if scene.size == size]
                texts = encoders.encode([prompt(scenes[i]) for i in rows])
                for i, image in zip(rows, sampler.sample(texts, size, sampling, rows, seed), strict=True):
                    images[i] = image
            verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
            result[name] = shares(verdicts)
            marks = [f"{'+' if v.all_right else 'WRONG'} {prompt(s)}" for v, s in zip(verdicts, scenes, strict=True)]
            with publish(run / "eval" / f"{step:08d}" / f"{name}.png") as temporary:
                contact_sheet(images, marks, columns=12, cell=96).save(temporary, format="png")
            say(f"{name}: {result[name]}")
    return result
