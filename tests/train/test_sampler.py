from __future__ import annotations

import numpy as np
import pytest
import torch

from stack.config import UserError, validate
from stack.evaluate.sample import load_sampler
from stack.flow.guidance import GuidanceConfig
from stack.train import snapshot
from stack.train.sampler import SamplerConfig


@pytest.fixture(scope="module")
def sampler(stage, mmdit):
    config = stage.train_config("sampled", schedule={"steps": 6, "warmup": 1})
    assert mmdit("train", config).returncode == 0
    return load_sampler(snapshot.read(stage.folder / "sampled"), torch.device("cpu"))


def test_an_image_does_not_depend_on_its_batch(sampler):
    sampler, encoders = sampler
    texts = encoders.encode(["a red circle", "a small blue star at the left on a white background", "a green triangle"])
    config = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=3))
    together = sampler.sample(texts, (32, 32), config, [5, 6, 7], seed=1)
    alone = sampler.sample(texts[1:2], (32, 32), config, [6], seed=1)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    other = sampler.sample(texts[1:2], (32, 32), config, [7], seed=1)
    assert np.abs(other[0].astype(int) - alone[0]).max() > 1


def test_both_halves_of_guidance_are_one_call_or_two(sampler):
    sampler, encoders = sampler
    text, sizes, images = encoders.encode(["a red circle", "a star"]), [], []
    hook = sampler.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for batched in (True, False):
        config = SamplerConfig(steps=2, guidance=GuidanceConfig(scale=3, batched=batched))
        images.append(np.stack(sampler.sample(text, (32, 32), config, [0, 1], seed=0)).astype(int))
    hook.remove()
    assert sizes == [4, 4, 2, 2, 2, 2]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sizes_and_solvers(sampler, solver):
    sampler, encoders = sampler
    images = sampler.sample(encoders.encode(["a star"]), (40, 24), SamplerConfig(steps=2, solver=solver), [0], seed=0)
    assert images[0].shape == (24, 40, 3)
    assert images[0].dtype == np.uint8


def test_guidance_without_a_scale_keeps_the_samplers() -> None:
    values = {"rescale": 0.7, "interval": [0.1, 0.9]}
    assert validate(SamplerConfig, {"guidance": values}, "x.yaml").guidance.scale == 4
    assert validate(SamplerConfig, {"guidance": {**values, "scale": 2}}, "x.yaml").guidance.scale == 2
    with pytest.raises(UserError, match=r"guidance: a section, expected guidance\.scale=3"):
        validate(SamplerConfig, {"guidance": 3}, "x.yaml")
