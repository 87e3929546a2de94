"""Images from labels on any objective: what is trained, what is drawn, and which combinations are refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from webdataset import TarWriter

from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import ImageBatch, ImageData, ImageDataset
from stack.flow.guidance import GuidanceConfig
from stack.flow.likelihood import ddpm_bound
from stack.flow.noise import NoisePlan
from stack.flow.samplers import NoiseFn
from stack.train import snapshot
from stack.train.class_to_image import ClassToImage, ClassToImageConfig, PreviewConfig, load, sample
from stack.train.classifier import Classifier, ClassifierConfig
from stack.train.recipe import TrainConfig

DIT = {"kind": "dit", "depth": 1, "width": 16, "num_heads": 2}
UNET = {"kind": "unet", "block_out_channels": [8, 8], "attention": [False, True], "layers_per_block": 1,
        "num_heads": 2, "context_dim": 8, "norm_groups": 4}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def dataset(labelled_data):
    return lambda **keys: ImageDataset(ImageData(**{**labelled_data, **keys}), seed=0)


@pytest.fixture
def objective(dataset):
    def build(data: dict[str, Any] | None = None, **keys: Any) -> ClassToImage:
        config = ClassToImageConfig.model_validate({"model": DIT, "classes": 2, **keys})
        return ClassToImage(config, dataset(**(data or {})), 0, CPU)

    return build


def normal(count: int) -> NoiseFn:
    return lambda stream: NoisePlan(1).at(0, range(count)).normal(stream, (1, 8, 8))


class Recorder(torch.nn.Module):
    """A network that says 0 and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(inputs)
        return torch.zeros_like(inputs[0])


def batch(count: int = 2000) -> ImageBatch:
    label_B = torch.arange(count) % 2
    return ImageBatch(0, list(range(count)), [""] * count, torch.full((count, 1, 8, 8), 0.5), label_B)


def test_labels_are_dropped_at_the_asked_rate_and_never_in_validation(objective):
    made, network = objective(dropout=0.25), Recorder()
    losses = made.loss(network, batch(), NoisePlan(0).at(0, range(2000)))
    label_B = network.calls[-1][2]
    dropped = label_B == 2
    assert abs(float(dropped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert torch.equal(label_B[~dropped], batch().label_B[~dropped])
    assert losses.by_time is not None
    assert torch.isclose(losses.total, losses.by_time[0].mean())
    made.validate(network, batch(), NoisePlan(0).at(0, range(2000)))
    assert torch.equal(network.calls[-1][2], batch().label_B)


def test_without_classes_no_label_is_told(objective):
    made, network = objective(classes=0), Recorder()
    made.loss(network, batch(), NoisePlan(0).at(0, range(2000)))
    assert not network.calls[-1][2].any()
    made.validate(network, batch(), NoisePlan(0).at(0, range(2000)))
    assert not network.calls[-1][2].any()


def test_the_loss_of_a_network_that_says_nothing_is_the_targets_square(objective):
    """ε − x_0 with x_0 = ½ everywhere: 1 + ¼."""
    made = objective()
    loss = made.loss(Recorder(), batch(), NoisePlan(0).at(0, range(2000))).total
    assert abs(float(loss) - 1.25) < 0.02


def test_validation_goes_through_eight_levels_of_the_paths_span(objective):
    made, network = objective(path={"kind": "vp"}, prediction="eps"), Recorder()
    made.validate(network, batch(16), NoisePlan(0).at(0, range(16)))
    first, last = 1e-3, 1.0
    expected = [first + (last - first) * (i % 8) / 8 for i in range(16)]
    assert network.calls[-1][1].tolist() == pytest.approx(expected)


def test_on_an_exploding_path_the_network_sees_scaled_images(objective):
    made, network = objective(path={"kind": "edm"}, prediction="edm"), Recorder()
    made.validate(network, batch(800), NoisePlan(0).at(0, range(800)))
    x, t, _ = network.calls[-1]
    assert float(x[t > 0.8].std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("linear", "velocity"), ("linear", "x"), ("cosine", "v"), ("ddpm", "eps"), ("edm", "edm"), ("ve", "score")],
)
@pytest.mark.parametrize("model", [DIT, UNET], ids=["dit", "unet"])
def test_every_objective_has_a_gradient_and_a_sheet(objective, dataset, path, prediction, model):
    """The sheet of a new network, which says 0, holds no NaN: it is drawn up to the path's ends."""
    made = objective(model=model, path={"kind": path}, prediction=prediction, preview={"count": 4, "steps": 3})
    data = dataset()
    one = next(iter(data.loader(0, 1, 0, 1, 1)))
    loss = made.loss(made.network, one, NoisePlan(0).at(0, one.positions)).total
    loss.backward()
    gradients = [p.grad for p in made.network.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.any() for g in gradients)
    with torch.inference_mode():
        image = sample(made.network, made._config, torch.arange(2), normal(2), PreviewConfig(steps=3))
        assert torch.isfinite(image).all()
        assert made.preview(made.network).size[0] > 64


def test_guidance_is_of_the_label_against_none(objective):
    made = objective()

    class Labels(torch.nn.Module):
        def forward(self, x, t, label):
            return torch.ones_like(x) * label.reshape(-1, 1, 1, 1)

    for scale in (1.0, 3.0):
        how = PreviewConfig(steps=4, guidance=GuidanceConfig(scale=scale))
        end = sample(Labels(), made._config, torch.arange(2), normal(2), how)
        velocity = torch.tensor([2 + scale * (0 - 2), 2 + scale * (1 - 2)]).reshape(-1, 1, 1, 1)
        assert torch.allclose(end, normal(2)("noise") - velocity, atol=1e-5)


def test_pairs_begin_with_their_second_image(objective, dataset, labelled):
    paired = {"paired": str(labelled / "paired")}
    made, network = objective(paired, coupling={"kind": "paired"}), Recorder()
    one = next(iter(dataset(**paired).loader(0, 1, 0, 1, 1)))
    made.loss(network, one, NoisePlan(0).at(0, one.positions))
    x, t_B, _ = network.calls[-1]
    t = t_B.reshape(-1, 1, 1, 1)
    assert torch.allclose(x, (1 - t) * one.image_BCHW + t * one.paired_BCHW, atol=1e-6)
    assert torch.allclose(one.image_BCHW, -one.paired_BCHW, atol=0.05)
    with torch.inference_mode():
        assert made.preview(made.network).size[1] > 64


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        ({"label": None}, {}, r"objective\.classes=2 needs labels: .* data\.label"),
        ({}, {"preview": {"solver": "langevin"}}, r"langevin wants path\.kind ve or edm"),
        (
            {},
            {"preview": {"guidance": {"scale": 2}}, "dropout": 0},
            r"guidance\.scale=2.0 needs labels, and some of them dropped",
        ),
        ({}, {"preview": {"guidance": {"scale": 2}}, "classes": 0}, r"objective\.classes is 0, objective\.dropout 0.1"),
        ({}, {"preview": {"guidance": {"autoguidance": 2}}}, "no weaker network"),
        (
            {},
            {"preview": {"guidance": {"classifier": 1, "interval": [0, 0.9]}}},
            r"guidance\.classifier needs a classifier's run: name it in `classifier`",
        ),
        ({}, {"coupling": {"kind": "paired"}}, "give both or neither"),
        ({"paired": "paired", "validation_share": 0}, {"coupling": {"kind": "paired"}}, "shown on held-out pairs"),
        ({"paired": "paired"}, {}, "give both or neither"),
        ({"paired": "paired"}, {"coupling": {"kind": "paired"}, "path": {"kind": "vp"}}, "takes it for normal"),
        ({"paired": "paired"}, {"coupling": {"kind": "paired"}, "prediction": "score"}, "takes it for normal"),
        ({"paired": "paired"}, {"coupling": {"kind": "paired"}, "weight": {"kind": "elbo"}}, "takes it for normal"),
        ({"buckets": {"resolution": 32}}, {}, r"kind=dit takes squares of one size.* 32×32, 40×24, 24×40"),
        ({}, {"model": {**DIT, "patch_size": 3}}, r"images of 8×8 do not divide into objective\.model\.patch_size=3"),
    ],
)
def test_what_does_not_go_together_says_why(objective, labelled, data, keys, message):
    if "paired" in data:
        data = {**data, "paired": str(labelled / data["paired"])}
    with pytest.raises(UserError, match=message):
        objective(data, **keys)


@pytest.fixture
def recipe(labelled_data):
    def write(run: Path, **sections: Any) -> Path:
        preview = {"count": 8, "steps": 8}
        values: dict[str, Any] = {
            "run": {"dir": str(run)},
            "data": labelled_data,
            "objective": {"kind": "class_to_image", "model": DIT, "classes": 2, "preview": preview},
            "optim": {"lr": 1e-2, "weight_decay": 0.0},
            "schedule": {"steps": 120, "warmup": 5},
            "checkpoint": {"every": 60},
            "ema": {"decay": 0.9},
            "log": {"every": 10, "wandb": "disabled"},
        }
        values |= {name: {**values.get(name, {}), **keys} for name, keys in sections.items()}
        run.with_suffix(".yaml").write_text(yaml.safe_dump(values))
        return run.with_suffix(".yaml")

    return write


def test_a_training_learns_the_classes_and_its_snapshot_draws_them(recipe, tmp_path, mmdit):
    run = tmp_path / "run"
    done = mmdit("train", recipe(run))
    assert done.returncode == 0, done.stderr
    network, config, _ = load(run, CPU)
    with torch.inference_mode():
        label_B = torch.arange(16) % 2
        image = sample(network, config, label_B, normal(16), PreviewConfig(solver="heun"))
    means = image.mean((1, 2, 3))
    assert means[label_B == 0].max() < 0 < means[label_B == 1].min()
    assert (run / "samples" / "00000120.png").exists()
    metadata = snapshot.read(run).metadata
    assert (metadata["kind"], metadata["channels"], metadata["sides"]) == ("class_to_image", 1, [[8, 8]])


def test_a_snapshot_is_drawn_and_judged_by_its_commands(recipe, tmp_path, mmdit):
    run = tmp_path / "run"
    assert mmdit("train", recipe(run)).returncode == 0
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n1\n1\n")
    means = {}
    for name, given in (("0", ("0",)), ("1", ("1",)), ("sheet", ("--prompts", labels))):
        options = ("--solver", "dpm_solver_pp_2m", "--steps", 6, "-o", tmp_path / f"{name}.png")
        done = mmdit("sample", run, *given, *options)
        assert done.returncode == 0, done.stderr
        means[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).mean()
    assert means["0"] < 127 < means["1"]
    for given, message in (("2", "has labels from 0 to 1"), ("bright", "is no label"), ("²", "is no label")):
        done = mmdit("sample", run, given)
        assert (done.returncode, message in done.stderr) == (2, True)

    done = mmdit("sample", run, "1", "--set", "guidance.classifier=1", "--set", "guidance.interval=[0,0.9]")
    assert (done.returncode, "needs a classifier's run" in done.stderr) == (2, True)
    done = mmdit("evaluate", run, "--nll", 4, "--nll-set", "levels")
    assert (done.returncode, "is not of the form key.subkey=value" in done.stderr) == (2, True)
    done = mmdit("export", run, "-o", tmp_path / "exported", "--to", "diffusers")
    assert (done.returncode, "a run of kind 'class_to_image' has no form of others" in done.stderr) == (2, True)
    done = mmdit("evaluate", run, "data.validation_share=0", "--nll", 4)
    assert (done.returncode, "no samples are held out to take bits a dimension of" in done.stderr) == (2, True)
    done = mmdit("evaluate", run, "objective.classes=3")
    assert (done.returncode, "the model that is configured with objective.classes=3" in done.stderr) == (2, True)

    options = ("--nll", 4, "--nll-set", "steps=20")
    exact = mmdit("evaluate", run, *options, "--nll-set", "trace=exact")
    assert exact.returncode == 0, exact.stderr
    probed = mmdit("evaluate", run, *options, "--nll-set", "probes=16", "--nll-set", "trace=gaussian")
    exact, probed = json.loads(exact.stdout), json.loads(probed.stdout)
    assert exact["nll_images"] == probed["nll_images"] == 4
    assert exact["bits_per_dim_trace_error"] == 0
    error = probed["bits_per_dim_trace_error"]
    assert 0 < error < 1
    assert probed["bits_per_dim"] == pytest.approx(exact["bits_per_dim"], abs=4 * error)
    assert exact["bits_per_dim"] < 8  # a uniform model's
    assert set(exact["val_loss_at_t"]) == {str(i / 8) if i else "0" for i in range(8)}
    done = mmdit("evaluate", run, *options, "--nll-set", "bound=true")
    assert (done.returncode, "nll.bound is of a model of pixels with path.kind=ddpm" in done.stderr) == (2, True)


def test_both_halves_of_guidance_are_one_call_or_two(objective):
    made, sizes, images = objective(), [], []
    made.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for parameter in made.network.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    for batched in (True, False):
        how = PreviewConfig(steps=2, guidance=GuidanceConfig(scale=3, batched=batched))
        with torch.inference_mode():
            images.append(sample(made.network, made._config, torch.tensor([0, 1]), normal(2), how))
    assert sizes == [4, 4, 2, 2, 2, 2]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_autoguidance_leads_away_from_the_snapshot_that_is_named(recipe, tmp_path, mmdit):
    run, images = tmp_path / "run", {}
    assert mmdit("train", recipe(run, schedule={"steps": 30}, snapshot={"every": 10})).returncode == 0
    for name, options in {"none": (), "10": ("--weak", 10), "20": ("--weak", 20), "30": ("--weak", 30)}.items():
        scale = ("--set", "guidance.autoguidance=3") if options else ()
        done = mmdit("sample", run, "1", "--steps", 6, "-o", tmp_path / "out.png", *options, *scale)
        assert done.returncode == 0, done.stderr
        images[name] = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert (images["30"] == images["none"]).all()
    assert (images["20"] != images["none"]).any()
    assert (images["10"] != images["20"]).any()


class Seen:
    """In the place of the Inception network: the first pixels as features, and what was looked at last."""

    images: list[np.ndarray]

    def __init__(self, *_: Any) -> None:
        pass

    def features(self, images: Any) -> torch.Tensor:
        Seen.images = list(images)
        return torch.stack([torch.from_numpy(image.reshape(-1)[:4].copy()).double() for image in Seen.images])


def test_a_trained_classifier_leads_to_the_class_that_is_asked_for(recipe, tmp_path, mmdit, monkeypatch):
    """The model has never seen a label, so that all it knows of them is the classifier's."""
    run, classifier, labels = tmp_path / "run", tmp_path / "classifier", tmp_path / "labels.txt"
    assert mmdit("train", recipe(run, objective={"dropout": 1.0})).returncode == 0
    path = recipe(classifier, schedule={"steps": 80})
    network = {"block_out_channels": [8, 8], "norm_groups": 4, "head_size": 8}
    values = {**yaml.safe_load(path.read_text()), "objective": {"kind": "classifier", "model": network, "classes": 2}}
    path.write_text(yaml.safe_dump(values))
    assert mmdit("train", path).returncode == 0
    keys = (f"classifier={classifier}", "guidance.classifier=8", "guidance.interval=[0,0.9]")
    guided = [word for key in keys for word in ("--set", key)]

    def mean_of(label: int, *options: object) -> float:
        labels.write_text(f"{label}\n" * 16)
        out = tmp_path / "out.png"
        done = mmdit("sample", run, "--prompts", labels, "--steps", 10, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        return float(np.asarray(Image.open(out)).mean())

    for label, sign in ((0, -1), (1, 1)):
        assert sign * (mean_of(label, *guided) - mean_of(label)) > 10

    monkeypatch.setattr("stack.evaluate.run.Inception", Seen)
    weights = tmp_path / "inception.safetensors"
    weights.touch()
    apart = {}
    for name, options in (("plain", ()), ("guided", guided)):
        done = mmdit("evaluate", run, "--samples", 16, "--steps", 10, "--inception", weights, *options)
        assert done.returncode == 0, done.stderr
        apart[name] = np.mean(Seen.images[1::2]) - np.mean(Seen.images[::2])
    assert apart["guided"] > apart["plain"] + 20


def test_ddpms_bound_is_above_what_the_density_says(recipe, tmp_path, mmdit):
    run = tmp_path / "run"
    path = {"kind": "ddpm", "steps": 100, "beta_last": 0.2}
    done = mmdit("train", recipe(run, objective={"path": path, "prediction": "v", "timesteps": {"kind": "uniform"}}))
    assert done.returncode == 0, done.stderr
    keys = ("trace=exact", "steps=20", "bound=true")
    done = mmdit("evaluate", run, "--nll", 12, *(word for key in keys for word in ("--nll-set", key)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bits_per_dim"] < found["ddpm_bound"] < 30
    network, config, _ = load(run, dist.device())
    made = ImageDataset(configuration.load(TrainConfig, run / "config.yaml").data, 0)
    batch = next(made.validation(12)).to(dist.device())
    with torch.inference_mode():
        fn = config.estimate_fn(config.predictor(lambda x, t: network(x, t, batch.label_B)))
        bound = ddpm_bound(fn, config.path, batch.image_BCHW, NoisePlan(0).at(0, batch.positions))
    assert found["ddpm_bound"] == pytest.approx(float(bound.value_B.mean()), rel=1e-5)


def test_a_flow_from_images_leads_from_those_that_are_given(recipe, tmp_path, mmdit):
    def grey(value: int) -> bytes:
        picture = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(picture, "png")
        return picture.getvalue()

    run, out, starts = tmp_path / "run", tmp_path / "out.png", {}
    (tmp_path / "faint").mkdir()
    with TarWriter(str(tmp_path / "faint" / "00000.tar"), encoder=False) as writer:
        for number in range(64):
            writer.write({"__key__": f"{number:02d}", "png": grey((110, 150)[number % 2])})
    pairs = {"data": {"paired": str(tmp_path / "faint")}, "objective": {"coupling": {"kind": "paired"}, "classes": 0}}
    done = mmdit("train", recipe(run, **pairs))
    assert done.returncode == 0, done.stderr
    for value, end in ((110, 40), (150, 220)):
        starts[value] = tmp_path / f"{value}.png"
        starts[value].write_bytes(grey(value))
        done = mmdit("sample", run, "--image", starts[value], "-o", out)
        assert done.returncode == 0, done.stderr
        assert abs(np.asarray(Image.open(out)).mean() - end) < 20
    done = mmdit("sample", run, "--image", starts[110], "--image", starts[150], "-o", out)
    assert "out.png: 2 images" in done.stdout
    left, right = np.split(np.asarray(Image.open(out))[:128], 2, axis=1)
    assert left.mean() + 100 < right.mean()

    assert mmdit("train", recipe(tmp_path / "plain", schedule={"steps": 1, "warmup": 1})).returncode == 0
    starts[0] = tmp_path / "broken.png"
    starts[0].write_bytes(b"GIF89a")
    for arguments, message in (
        ((run, "0"), "begins with images, not with noise: name them with --image"),
        ((tmp_path / "plain", "1", "--image", starts[110]), "begins with noise, not with images"),
        ((run, "--image", starts[0]), "broken.png: image not readable"),
    ):
        done = mmdit("sample", *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    for asked, message in (
        (
            ("--samples", 4, "--inception", starts[0]),
            "begins with images, and FID and KID are of runs that begin with noise",
        ),
        (("--scenes", 4), "does not draw images from prompts"),
    ):
        done = mmdit("evaluate", run, *asked)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_a_training_that_was_stopped_goes_on_exactly(recipe, tmp_path, mmdit, history):
    """diffusers' own label dropout would draw from torch's generator, which nobody saves."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    keys = {"log": {"every": 1}, "checkpoint": {"every": 3}, "schedule": {"steps": 6, "warmup": 2}}
    for run in (whole, parts):
        assert mmdit("train", recipe(run, **keys)).returncode == 0
    shutil.rmtree(parts / "checkpoints" / "00000006")
    assert mmdit("train", parts.with_suffix(".yaml")).returncode == 0
    assert history(parts) == history(whole)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"classes": 1}}, "has label 1, and objective.classes=1 ends with 0"),
        ({"data": {"label": "number"}}, "and objective.classes=2 ends with 1"),
        ({"data": {"label": "nothing"}}, "× no label"),
        ({"objective": {"model": {"kind": "mmdit", "preset": "mmdit-test"}}}, "knows captions, not labels"),
    ],
)
def test_what_does_not_fit_ends_a_training_in_one_line(recipe, tmp_path, mmdit, sections, message):
    done = mmdit("train", recipe(tmp_path / "run", **sections))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mmdit:")]
    assert message in line


def test_a_preview_is_guided_by_a_classifier_of_its_own_path(objective, dataset, tmp_path):
    """Without labels: the classifier alone tells bright from dark."""
    values = {"model": {"block_out_channels": [8, 8], "norm_groups": 4, "head_size": 8}, "classes": 2}
    classifier = Classifier(ClassifierConfig.model_validate(values), dataset(), 0, CPU)
    for parameter in classifier.network.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    weights = {name: p.detach() for name, p in classifier.network.named_parameters()}
    snapshot.write(tmp_path, 1, weights, classifier.metadata())
    guidance = {"classifier": 2.0, "interval": [0, 0.9]}
    preview = {"guidance": guidance, "classifier": str(tmp_path), "count": 4, "steps": 4}
    plain = objective(classes=0, preview={"count": 4, "steps": 4})
    guided = objective(classes=0, preview=preview)
    with torch.inference_mode():
        sheets = [np.asarray(made.preview(made.network)) for made in (plain, guided)]
    assert (sheets[0] != sheets[1]).any()
    with pytest.raises(UserError, match=r"a classifier of the path .*linear.*, and objective\.path is .*vp"):
        objective(path={"kind": "vp"}, preview=preview)
    with pytest.raises(UserError, match=r"a classifier of 2 classes in images of 1 channels, wanted are 2 and 3"):
        objective(data={"channels": 3}, preview=preview)
    with pytest.raises(UserError, match=r"a classifier of 2 classes .*, wanted are 3 and 1"):
        objective(classes=3, preview=preview)


def test_a_run_of_another_kind_is_refused(tmp_path):
    snapshot.write(tmp_path, 1, {"x": torch.zeros(1)}, {"kind": "autoencoder"})
    with pytest.raises(UserError, match="kind 'autoencoder' has no network that draws classes"):
        load(tmp_path, CPU)


def test_the_shipped_recipe_is_of_the_digits():
    config = configuration.load(TrainConfig, Path(__file__).parents[2] / "configs" / "train" / "digits.yaml")
    assert isinstance(config.objective, ClassToImageConfig)
    assert config.objective.classes == 10
