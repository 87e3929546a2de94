"""Classes drawn in an autoencoder's latents: what the flow is of, and that pixels come out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoders import codec
from autoencoders.codec import Codec, to_uint8
from stack import dist
from stack.config import UserError
from stack.flow.noise import NoisePlan
from stack.train import snapshot
from stack.train.class_to_image import load, sample
from stack.train.space import Space

CPU = torch.device("cpu")
DIT = {"kind": "dit", "depth": 1, "width": 32, "num_heads": 2, "patch_size": 4}


@pytest.fixture
def recipe(stage, tmp_path):
    def write(name: str, **objective: Any) -> Path:
        values = {
            "run": {"dir": str(tmp_path / name)},
            "data": {
                "kind": "images",
                "source": str(stage.shards),
                "buckets": {"resolution": 64, "max_ratio": 1},
                "label": "label",
                "batch_size": 8,
                "max_validation": 8,
            },
            "objective": {"kind": "class_to_image", "model": DIT, "classes": 8, "preview": {"count": 4, "steps": 2},
                          "autoencoder": str(stage.codec), **objective},
            "schedule": {"steps": 4, "warmup": 1},
            "checkpoint": {"every": 2},
            "log": {"every": 1, "wandb": "disabled"},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_latents_are_drawn_from_the_posterior_and_normalised(stage):
    space, draws = Space(str(stage.codec), 3, [(64, 64)], CPU), NoisePlan(0).at(3, [0, 1])
    assert (space.channels, space.sides, space.image_sides) == (4, [(16, 16)], [(64, 64)])
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    vae = Codec.load(str(stage.codec))
    with torch.no_grad():
        moments = vae.encode(image)
    expected = codec.draw(moments, draws.normal("posterior", (4, 16, 16)), vae.affine)
    assert torch.equal(space.enter(image, draws), expected)
    with torch.no_grad():
        assert torch.equal(space.leave(expected), vae.decode(expected))


def test_a_training_in_latents_draws_pixels(recipe, stage, mmdit, tmp_path, history):
    run, out = tmp_path / "run", tmp_path / "out.png"
    done = mmdit("train", recipe("run"))
    assert done.returncode == 0, done.stderr
    network, config, space = load(run, dist.device())
    with torch.inference_mode(), dist.device():
        found = network(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert found.shape == (1, 4, 16, 16)
    sheet = Image.open(run / "samples" / "00000004.png")
    assert sheet.width > 4 * 64
    assert mmdit("sample", run, "3", "-o", out).returncode == 0
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (64, 64, 3)

    noise = space.beginning(NoisePlan(0).at(0, [0]), dist.device())
    with torch.inference_mode():
        latent = sample(network, config, torch.tensor([3]), noise, config.preview)
        assert np.array_equal(to_uint8(space.leave(latent)).numpy()[0], drawn)

    done = mmdit("evaluate", run)
    assert done.returncode == 0, done.stderr
    for command in (("sample", run, "3"), ("evaluate", run)):
        done = mmdit(*command, "--set", "seed=7")
        assert (done.returncode, "count and seed are of the training's sheet" in done.stderr) == (2, True), done.stderr
    done = mmdit("evaluate", run, "--nll", 4)
    assert (done.returncode, "has no bits a dimension" in done.stderr) == (2, True)
    done = mmdit("sample", run, "3", "--set", "guidance.classifier=1", "--set", "guidance.interval=[0,0.9]")
    assert (done.returncode, "guidance.classifier looks at pixels" in done.stderr) == (2, True)

    before = history(run)
    shutil.rmtree(run / "checkpoints" / "00000004")
    assert mmdit("train", recipe("run")).returncode == 0
    assert history(run) == before


def test_another_autoencoder_is_refused(recipe, stage, mmdit, tmp_path):
    copy = tmp_path / "codec"
    shutil.copytree(stage.codec, copy)
    config = recipe("run", autoencoder=str(copy))
    assert mmdit("train", config).returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004")
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for command in (("sample", tmp_path / "run", "1"), ("evaluate", tmp_path / "run")):
        done = mmdit(*command)
        assert (done.returncode, "autoencoder" in done.stderr, "trained" in done.stderr) == (2, True, True), done.stderr
    done = mmdit("train", config)
    assert (done.returncode, "began with another autoencoder" in done.stderr) == (2, True), done.stderr
    assert snapshot.read(tmp_path / "run").metadata["sides"] == [[64, 64]]


@pytest.mark.parametrize(
    ("channels", "side", "message"),
    [(1, 64, "takes images in colour, and data.channels is 1"), (3, 62, "62 pixels does not divide by .* 4")],
)
def test_images_that_do_not_fit_say_why(stage, channels, side, message):
    with pytest.raises(UserError, match=message):
        Space(str(stage.codec), channels, [(side, side)], CPU)
