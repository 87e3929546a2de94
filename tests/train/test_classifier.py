"""The classifier of noisy images: what it is shown, what it learns, and how guidance gets it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from stack.config import UserError
from stack.data.dataset import ImageData, ImageDataset
from stack.flow.noise import NoisePlan
from stack.train import snapshot
from stack.train.classifier import Classifier, ClassifierConfig, load_classifier

CPU = torch.device("cpu")
MODEL = {"block_out_channels": [8, 8], "norm_groups": 4, "head_size": 8}


@pytest.fixture
def data(labelled_data):
    return lambda **keys: ImageDataset(ImageData(**{**labelled_data, **keys}), seed=0)


def test_a_classifier_learns_and_guidance_gets_its_gradient(data, labelled_data, tmp_path, mmdit):
    """EDM's path: from images that are plain to see to ones where nothing is left of them."""
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    values = {
        "run": {"dir": str(run)},
        "data": labelled_data,
        "objective": {"kind": "classifier", "model": MODEL, "classes": 2, "path": {"kind": "edm"}},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
        "schedule": {"steps": 80, "warmup": 5},
        "ema": {"decay": 0.9},
        "log": {"every": 10, "wandb": "disabled"},
    }
    path.write_text(yaml.safe_dump(values))
    done = mmdit("train", path)
    assert done.returncode == 0, done.stderr
    classify, config = load_classifier(run, CPU)
    objective = Classifier(config, data(), 0, CPU)
    objective.network.load_state_dict(snapshot.read(run).weights)
    with torch.inference_mode():
        rows = objective.by_level(objective.network.eval())
    assert [t for t, *_ in rows] == pytest.approx([i / 8 for i in range(8)])
    assert rows[0][2] == 1
    assert rows[0][1] < 0.3 < rows[-1][1]
    assert rows[-1][2] < 0.9

    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    log_p = classify(x, torch.full((2,), 0.3))
    assert torch.allclose(log_p.exp().sum(1), torch.ones(2))
    (gradient,) = torch.autograd.grad(log_p[0, 0] + log_p[1, 1], x)
    assert gradient[0].mean() < 0 < gradient[1].mean()  # darker is the first class, brighter the second
    assert (run / "samples" / "00000080.png").exists()
    accuracy = [json.loads(line).get("accuracy") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(value for value in accuracy if value is not None) > 0.6


def test_the_loaded_classifier_takes_images_as_they_stand_on_the_path(data, tmp_path):
    """On an exploding path the network itself is given scaled ones, in training and here."""
    config = ClassifierConfig.model_validate({"model": MODEL, "classes": 2, "path": {"kind": "edm"}})
    objective = Classifier(config, data(), 0, CPU)
    for parameter in objective.network.parameters():
        parameter.data.normal_(std=0.3)
    weights = {name: p.detach() for name, p in objective.network.named_parameters()}
    snapshot.write(tmp_path, 1, weights, objective.metadata())
    classify, _ = load_classifier(tmp_path, CPU)
    batch = next(iter(objective._data.validation(8)))
    draws = NoisePlan(0).at(0, batch.positions)
    t = torch.tensor([i % 8 / 8 for i in batch.positions])
    sigma = config.path.at(t).b.float().reshape(-1, 1, 1, 1)
    x = batch.image_BCHW + sigma * draws.normal("noise", (1, 8, 8))
    with torch.inference_mode():
        expected = -classify(x, t)[torch.arange(len(x)), batch.label_B]
        assert torch.allclose(objective.validate(objective.network, batch, draws), expected, atol=1e-5)


def test_what_does_not_go_together_says_why(data, tmp_path):
    config = ClassifierConfig.model_validate({"model": MODEL, "classes": 2})
    with pytest.raises(UserError, match=r"needs labels: .* data\.label"):
        Classifier(config, data(label=None), 0, CPU)
    snapshot.write(tmp_path, 1, {"x": torch.zeros(1)}, {"kind": "class_to_image"})
    with pytest.raises(UserError, match="kind 'class_to_image' is no classifier"):
        load_classifier(tmp_path, CPU)
