"""FID, KID and CLIP score are what the libraries give for the same images, and of the images that they should be of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from stack.config import load
from stack.data.dataset import ImageDataset, LatentData, LatentDataset
from stack.evaluate import metrics
from stack.evaluate.metrics import Inception
from stack.evaluate.sample import draw, draw_labels, load_sampler
from stack.flow.guidance import GuidanceConfig
from stack.text.conditioning import collate, split
from stack.text.encoders import ClipScore
from stack.train import snapshot
from stack.train.recipe import TrainConfig
from stack.train.sampler import SamplerConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """torch-fidelity's InceptionV3 with random weights."""
    from safetensors.torch import save_file
    from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3

    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        save_file(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small random CLIP as open_clip saves it, of so few dimensions that its cosines are large."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(2)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


@pytest.fixture
def few_features(monkeypatch) -> None:
    """The 64 features of an early layer: FID of 2048 takes half a minute a time."""
    monkeypatch.setattr(metrics, "LAYER", "64")


class Images(Dataset):
    def __init__(self, seed: int, count: int):
        shape = (count, 3, 24, 32)
        self.images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def test_values_are_torch_fidelitys(inception, few_features, tmp_path):
    from safetensors.torch import load_file
    from torch_fidelity import calculate_metrics

    torch.save(load_file(inception), tmp_path / "weights.pth")
    drawn, reference = Images(0, 20), Images(1, 30)
    expected = calculate_metrics(
        input1=drawn,
        input2=reference,
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=20,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    network = Inception(inception, CPU, batch_size=7)
    features = [network.features(images.images.permute(0, 2, 3, 1).numpy()) for images in (drawn, reference)]
    assert metrics.fid(*features) == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    mean, std = metrics.kid(*features)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-2)


def test_images_of_several_sizes_keep_their_order(inception):
    generator = np.random.default_rng(0)
    sizes = [(16, 16), (16, 16), (8, 24), (16, 16)]
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    network = Inception(inception, CPU, batch_size=4)
    together = network.features(images)
    assert together.shape == (4, 2048)
    for image, features_D in zip(images, together, strict=True):
        torch.testing.assert_close(network.features([image])[0], features_D, rtol=1e-4, atol=1e-5)


def test_fid_and_kid_of_gaussians():
    """With diagonal covariances: |μ − μ'|² + Σ (σ − σ')², exactly, where the samples have these moments exactly."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(mean: list[float], std: list[float]) -> torch.Tensor:
        values = torch.randn(600, len(mean), generator=generator, dtype=torch.float64)
        values -= values.mean(0)
        values = values @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(values.T)).T)
        return values * torch.tensor(std) + torch.tensor(mean)

    one, other = gaussian([0, 1, 2], [1, 2, 0.5]), gaussian([1, 1, 0], [2, 2, 1])
    assert metrics.fid(one, other) == pytest.approx(1 + 4 + 1 + 0.25)
    assert metrics.fid(one, one) == pytest.approx(0, abs=1e-9)
    again = gaussian([0, 1, 2], [1, 2, 0.5])
    assert abs(metrics.kid(one, again)[0]) < 0.1 * metrics.kid(one, other)[0]


def test_clip_score_is_the_cosine(clip):
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    captions = ["a red circle", "a blue star above a green square", "nothing"]
    images = list(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8))
    with torch.inference_mode():
        text_BD = model.eval().encode_text(open_clip.tokenize(captions))
        image_BD = model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
    expected = 100 * torch.nn.functional.cosine_similarity(image_BD, text_BD).clamp(min=0)
    assert expected.max() > 10 > expected.min() == 0
    score = ClipScore(clip, CPU)
    assert score(images, captions) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


def test_by_timestep():
    losses = metrics.by_timestep(torch.arange(18, dtype=torch.float64))
    assert list(losses) == ["0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875"]
    assert (losses["0"], losses["0.125"], losses["0.875"]) == ((0 + 8 + 16) / 3, (1 + 9 + 17) / 3, (7 + 15) / 2)
    assert metrics.by_timestep(torch.ones(3)) == {"0": 1.0, "0.125": 1.0, "0.25": 1.0}


def test_a_batch_of_captions_is_split_into_them(stage):
    data = LatentDataset(LatentData(path=str(stage.encoded), validation_share=0.5), seed=0)
    lengths = set()
    for batch in data.validation(8):
        captions = split(batch.text)
        again = collate(captions, batch.text.pad)
        for name in ("t5_BLD", "clip_l_BLD", "clip_g_BLD", "pooled_BD", "t5_length_B", "clip_length_B"):
            assert torch.equal(getattr(again, name), getattr(batch.text, name)), name
        lengths |= {len(caption.t5) for caption in captions}
    assert len(lengths) > 3


@pytest.fixture(scope="module")
def run(stage, mmdit) -> Path:
    assert mmdit("train", stage.train_config("measured")).returncode == 0
    return stage.folder / "measured"


def test_the_command_measures_samples_of_the_held_out_captions(
    run, stage, mmdit, inception, clip, few_features, tmp_path
):
    """Against the same samples, drawn here with encoders that read the captions: FID is 0, and the score is theirs."""
    data = LatentDataset(LatentData(path=str(stage.encoded), batch_size=8, max_validation=8), seed=0)
    captions = data.validation_captions()
    _, sizes = metrics.held_out_prompts(data, 3)
    assert len(captions) == len(sizes) == 3  # a share of 0.03
    captions, sizes = (captions * 2)[:5], (sizes * 2)[:5]
    sampler, encoders = load_sampler(snapshot.read(run), CPU)
    config = SamplerConfig(steps=2, guidance=GuidanceConfig(scale=1.5))
    images: dict[int, np.ndarray] = {}
    for rows, drawn in draw(sampler, encoders.encode(captions), sizes, config, seed=3):
        images |= dict(zip(rows, drawn, strict=True))
    reference = tmp_path / "reference"
    reference.mkdir()
    for row, image in images.items():
        Image.fromarray(image).save(reference / f"{row}.png")

    asked = ("--samples", 5, "--steps", 2, "--guidance", 1.5, "--seed", 3, "--inception", inception)
    done = mmdit("evaluate", run, *asked, "--clip", clip, "--reference", reference)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    score = ClipScore(clip, CPU)([images[row] for row in range(5)], captions)
    assert result["clip_score"] == pytest.approx(np.mean(score), abs=0.1)
    network = Inception(inception, CPU, 8)
    spread = metrics.fid(*(network.features([images[row] for row in rows]) for rows in ((0, 1), (2, 3))))
    assert abs(result["fid"]) < 0.05 * spread
    assert len(list((run / "eval" / "00000004").glob("*-samples.png"))) == 1
    assert result == json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert list(result["val_loss_at_t"]) == ["0", "0.125", "0.25"]

    done = mmdit("evaluate", run, *asked)
    assert done.returncode == 0, done.stderr
    against_decoded = json.loads(done.stdout)["fid"]
    codec = sampler._codec
    features = network.features(metrics.decoded(data, codec, 2))
    assert len(features) == 3
    expected = metrics.fid(network.features([images[row] for row in range(5)]), features)
    assert against_decoded == pytest.approx(expected, rel=0.02)


def test_samples_of_all_classes_are_compared_with_held_out_pixels(mmdit, inception, few_features, tmp_path):
    run, digits = tmp_path / "run", tmp_path / "digits"
    assert mmdit("data", "digits", digits).returncode == 0
    small = ("objective.model.depth=1", "schedule.steps=2", "schedule.warmup=1", "data.max_validation=8")
    config = Path(__file__).parents[2] / "configs" / "train" / "digits.yaml"
    done = mmdit("train", config, f"run.dir={run}", f"data.source={digits}", *small, "log.wandb=disabled")
    assert done.returncode == 0, done.stderr
    asked = ("--samples", 12, "--steps", 2, "--guidance", 3, "--seed", 5, "--inception", inception)
    done = mmdit("evaluate", run, *asked)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["sampling"]["steps"], result["sampling"]["guidance"]["scale"]) == (2, 3)
    labels = [*range(10), 0, 1]
    drawn = draw_labels(snapshot.read(run), labels, ("steps=2", "guidance.scale=3"), seed=5)
    network, trained = Inception(inception, CPU, 8), load(TrainConfig, run / "config.yaml")
    held_out = list(metrics.pixels(ImageDataset(trained.data, trained.run.seed), 5))
    assert len(held_out) == 8
    expected = metrics.fid(network.features(drawn), network.features(held_out))
    assert result["fid"] == pytest.approx(expected, rel=1e-3)
    assert list((run / "eval").glob("*/*-samples.png"))
    for wrong, message in (
        (("--samples", 4, "--clip", "x"), "does not draw images from prompts"),
        (("--scenes", 4), "does not draw images from prompts"),
        ((*asked, "--set", "batch=3"), "unknown key 'batch'"),
        ((*asked, "--set", "guidance.classifier=1"), "nothing to look at in the noise"),
    ):
        done = mmdit("evaluate", run, *wrong)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--watch", "--steps", 0), "steps: "),
        (("--samples", 8), "go together"),
        (("--inception", "x.safetensors"), "go together"),
        (("--samples", 8, "--clip", "x", "--reference", "y"), "reference is for inception"),
        (("--samples", 8, "--inception", "x.pth"), "README.md says how to convert"),
        (("--samples", 8, "--inception", "x.safetensors"), "cannot be loaded"),
        (("--samples", 8, "--clip", "x"), "has no open_clip_config.json"),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_one_line(run, mmdit, arguments, message):
    done = mmdit("evaluate", run, *arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1
