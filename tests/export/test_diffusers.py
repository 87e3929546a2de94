"""What `mmdit export --to diffusers` writes, in diffusers' own pipelines, against this stack's sampler."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from stack.evaluate.sample import load_sampler
from stack.flow.noise import NoisePlan
from stack.flow.process import FlowConfig
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.conditioning import collate, join
from stack.text.encoders import TextConfig
from stack.train import snapshot
from stack.train.sampler import SamplerConfig
from stack.train.text_to_image import encoder_fingerprints

PROMPT = "a small red star at the left of a large blue circle!"
SD3: dict[str, Any] = {"preset": "mmdit-test", "context_dim": 128, "pooled_dim": 128}
FLUX: dict[str, Any] = {"preset": "flux-test", "context_dim": 128, "pooled_dim": 48}
FLUX_TEXT = {"clip_g": None, "clip_tokens": False, "clip_projection": False}
STEP = 7


@pytest.fixture(scope="module")
def make(stage, tmp_path_factory, mmdit) -> Callable[..., tuple[Path, Path]]:
    """A run with one snapshot, of random weights, and what is exported of it."""

    def make(model: dict[str, Any], sampling: dict[str, Any], *options: object, **text: Any) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("export")
        run = folder / "run"
        config = MMDiTConfig(**model)
        network = MMDiT(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        encoders = {name: str(stage.encoders / name) for name in ("t5", "clip_l", "clip_g")}
        captions = TextConfig(**{**encoders, "pad": "full", "t5_max_tokens": 40, **text})
        metadata = {
            "kind": "text_to_image",
            "flow": FlowConfig().model_dump(mode="json"),
            "model": config.model_dump(mode="json"),
            "text": captions.model_dump(mode="json"),
            "autoencoder": str(stage.codec),
            "encoders": encoder_fingerprints(captions, str(stage.codec)),
            "sampling": {**SamplerConfig(shift=3.0, steps=6).model_dump(), "size": [64, 48], **sampling},
        }
        snapshot.write(run, STEP, network.state_dict(), metadata)
        done = mmdit("export", run, "-o", folder / "out", "--to", "diffusers", *options)
        assert done.returncode == 0, done.stderr
        return run, folder / "out"

    return make


def drawn(run: Path, *prompts: str) -> list[np.ndarray]:
    """By this stack, each from the same noise."""
    snap = snapshot.read(run)
    sampler, encoders = load_sampler(snap, torch.device("cpu"))
    values = dict(snap.metadata["sampling"])
    size = tuple(values.pop("size"))
    return sampler.sample(encoders.encode(prompts), size, SamplerConfig(**values), [0] * len(prompts), seed=0)


def expected_of(run: Path) -> np.ndarray:
    """For PROMPT, once it is seen that the image has content and that the prompt matters to it."""
    image, other = drawn(run, PROMPT, "a yellow triangle")
    assert image.std() > 20
    assert psnr(other, image) < 40
    return image


def noise() -> Tensor:
    return NoisePlan(0).at(0, [0]).normal("noise", (4, 12, 16))


def psnr(image: Any, other: np.ndarray) -> float:
    """In decibels, of images of 8 bits; 138 where they are equal."""
    error = np.asarray(image).astype(float) - other.astype(float)
    value = 10 * math.log10(255**2 / max(float(np.square(error).mean()), 1e-9))
    print(f"{value:.1f} dB")
    return value


def pipeline(folder: Path) -> Any:
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grid(steps: int = 6) -> dict[str, Any]:
    return {"num_inference_steps": steps, "sigmas": [1 - i / steps for i in range(steps)], "height": 48, "width": 64}


def zeros(num_tokens: int, pooled_dim: int) -> dict[str, Tensor]:
    return {
        "negative_prompt_embeds": torch.zeros(1, num_tokens, 128),
        "negative_pooled_prompt_embeds": torch.zeros(1, pooled_dim),
    }


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_stable_diffusion_3_draws_what_the_sampler_draws(make, guidance):
    run, out = make(SD3, {"guidance": {"scale": guidance}})
    expected = expected_of(run)
    pipe = pipeline(out)
    image = pipe(
        PROMPT, max_sequence_length=40, guidance_scale=guidance, latents=noise(), **grid(), **zeros(77 + 40, 128)
    ).images[0]
    assert psnr(image, expected) > 50


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_flux_draws_what_the_sampler_draws(make, embedded, guidance):
    model = {**FLUX, "guidance_embedding": embedded}
    run, out = make(model, {"guidance": {"scale": guidance}, "embedded_guidance": 2.5}, **FLUX_TEXT)
    expected = expected_of(run)
    pipe = pipeline(out)
    if guidance != 1:  # the pipeline compares their shapes
        embeds, pooled, _ = pipe.encode_prompt(PROMPT, max_sequence_length=40)
        prompt = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        prompt = {"prompt": PROMPT, "max_sequence_length": 40}
    latents = pipe._pack_latents(noise(), 1, 4, 12, 16)
    scales = {"true_cfg_scale": guidance, "guidance_scale": 2.5}
    image = pipe(**prompt, **scales, latents=latents, **grid(), **zeros(40, 48)).images[0]
    assert psnr(image, expected) > 50


PROMPTS = [PROMPT, "", "grinning face: 12 o'clock !", "a " + "very " * 90 + "long caption"]


@pytest.mark.parametrize(("model", "text"), [(SD3, {}), (FLUX, FLUX_TEXT)], ids=["sd3", "flux"])
def test_the_pipelines_encoders_are_ours(make, model, text):
    run, out = make(model, {}, **text)
    pipe = pipeline(out)
    snap = snapshot.read(run)
    _, encoders = load_sampler(snap, torch.device("cpu"))
    batch = collate(encoders.encode(PROMPTS), "full")
    tokens_TD, lengths, pooled_BD = join(batch, snap.metadata["model"]["context_dim"])
    with torch.no_grad():
        if model is SD3:
            theirs, _, their_pooled, _ = pipe.encode_prompt(
                PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=40
            )
        else:
            theirs, their_pooled, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=40)
    assert (tokens_TD.view(4, lengths[0], -1) - theirs).abs().max() < 1e-4
    assert (pooled_BD - their_pooled).abs().max() < 1e-4


PUBLISHED = {"sd3", "sd3 without T5", "flux", "flux of bigG"}
"""Forms in which the pipelines themselves feed captions."""
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd3": (SD3, {}),
    "sd3 without T5": (SD3, {"t5": None}),
    "sd3 without padding": (SD3, {"pad": "trim"}),
    "sd3 without padding and T5": (SD3, {"pad": "trim", "t5": None}),
    "sd3 without CLIP's tokens": (SD3, {"clip_tokens": False}),
    "the demo's": (SD3, {"pad": "trim", "clip_tokens": False}),
    "sd3, not projected": (SD3, {"clip_projection": False}),
    "flux": (FLUX, FLUX_TEXT),
    "flux without padding": (FLUX, {**FLUX_TEXT, "pad": "trim"}),
    "flux, projected": (FLUX, {**FLUX_TEXT, "clip_projection": True}),
    "flux of bigG": ({**FLUX, "pooled_dim": 80}, {**FLUX_TEXT, "clip_g": ..., "clip_l": None}),
    "flux with CLIP's tokens": (FLUX, {**FLUX_TEXT, "clip_tokens": True, "pad": "trim"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_code_of_the_card_draws_what_the_sampler_draws(stage, make, form, monkeypatch):
    model, text = FORMS[form]
    text = {name: str(stage.encoders / name) if value is ... else value for name, value in text.items()}
    run, out = make(model, {"guidance": {"scale": 2.0}}, **text)
    card = (out / "README.md").read_text()
    assert ("does not encode a prompt as this model was trained" in card) == (form not in PUBLISHED)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace('"a red circle"', "PROMPT")
    packed = "latents" if model is SD3 else "pipe._pack_latents(latents, 1, 4, 12, 16)"
    code, replaced = re.subn(r"generator=.*,", f"latents={packed},", code)
    assert replaced == 1
    monkeypatch.chdir(out)
    exec(code, {"PROMPT": PROMPT, "latents": noise()})
    found = psnr(Image.open("image.png"), expected_of(run))
    assert found > 50


def dtypes(file: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(file).values()}


def test_files_are_copied_and_readable(stage, make):
    _, out = make(SD3, {}, "--dtype", "bfloat16")
    for part, source, stem in (
        ("vae", stage.codec, "diffusion_pytorch_model"),
        ("text_encoder", stage.encoders / "clip_l", "model"),
        ("text_encoder_3", stage.encoders / "t5", "model"),
    ):
        for name in ("config.json", f"{stem}.safetensors"):
            assert (out / part / name).read_bytes() == (source / name).read_bytes()
    assert dtypes(out / "transformer" / "diffusion_pytorch_model.safetensors") == {torch.bfloat16}
    assert dtypes(out / "text_encoder_2" / "model.safetensors") == {torch.float16}  # open_clip's own
    assert {file.stat().st_mode & 0o777 for file in out.rglob("*") if file.is_file()} == {0o644}
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    index = json.loads((out / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {path.name for path in out.iterdir() if path.is_dir()}
    assert index["_diffusers_version"] == version("diffusers")
    assert pipeline(out).scheduler.config.shift == 3.0


def test_the_card_says_what_it_is(stage, make, mmdit):
    run, out = make(SD3, {"solver": "heun"}, pad="trim")
    card = (out / "README.md").read_text()
    network, encoders = MMDiT(MMDiTConfig(**SD3)), snapshot.read(run).metadata["encoders"]
    for said in (
        f"{sum(p.numel() for p in network.parameters()):,} parameters",
        "for 7 steps;",
        "the solver heun",
        "CLIP-L (at most 77 tokens)",
        "`pad: trim`",
        "An empty caption was 3 tokens of zeros",
        *encoders.values(),
    ):
        assert said in card
    assert not (out / "preview.png").exists()
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run / "samples" / f"{STEP:08d}.png")
    assert mmdit("export", run, "-o", out, "--to", "diffusers", "--replace").returncode == 0
    assert "(preview.png)" in (out / "README.md").read_text()
    assert (out / "preview.png").read_bytes() == (run / "samples" / f"{STEP:08d}.png").read_bytes()


def test_a_run_goes_on_from_what_was_exported(stage, mmdit, tmp_path):
    """Trained, exported, fine-tuned: the first step has the loss of the weights in the run's own snapshot."""
    first = stage.train_config("exported", run={"dir": str(tmp_path / "first")}, optim={"lr": 1e-2})
    assert mmdit("train", first).returncode == 0
    losses = {}
    for target, name in (("diffusers", "pipeline"), ("single", "one.safetensors"), ("stack", "own")):
        assert mmdit("export", tmp_path / "first", "-o", tmp_path / name, "--to", target).returncode == 0
        run = tmp_path / f"second-{target}"
        second = (f"run.dir={run}", f"init.from={tmp_path / name}", "schedule.steps=2", "schedule.warmup=1")
        done = mmdit("train", first, *second)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[target] = [line["loss"] for line in lines if "loss" in line]
    assert losses["diffusers"] == losses["single"] == losses["stack"]
    assert losses["stack"][0] != losses["stack"][1]
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert losses["stack"][0] != lines[0]["loss"]  # of the same batch and noise, before anything was learnt
    another = (f"run.dir={tmp_path / 'third'}", f"init.from={tmp_path / 'own'}", "objective.model.depth=3")
    done = mmdit("train", first, *another)
    assert done.returncode == 2
    assert "is another model than objective.model: it has {'depth': 2}, expected {'depth': 3}" in done.stderr
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "for 4 steps (32 samples)" in card
    assert (tmp_path / "pipeline" / "preview.png").exists()


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        (SD3, {"clip_g": None}, "StableDiffusion3Pipeline has two CLIP encoders, this run clip_l alone"),
        (FLUX, {"clip_g": None, "t5": None}, "FluxPipeline has T5 and one CLIP encoder, this run clip_l:"),
        (FLUX, {"pad": "trim"}, "FluxPipeline has T5 and one CLIP encoder, this run clip_l and clip_g and t5"),
        ({**SD3, "mlp_ratio": 2}, {}, "has mlp_ratio=4 always, this model 2"),
    ],
)
def test_what_a_pipeline_has_no_place_for_is_refused(make, mmdit, model, text, says):
    with pytest.raises(AssertionError, match=says):  # of the export's standard error
        make(model, {}, **text)


def test_mistakes_are_one_line(stage, make, mmdit, tmp_path):
    run, out = make(SD3, {})

    def refused(*arguments: object) -> str:
        done = mmdit("export", *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    to = ("--to", "diffusers")
    assert "exists already" in refused(run, "-o", out, *to)
    assert "ends in .safetensors" in refused(run, "-o", tmp_path / "x", "--to", "single")
    assert "ends in .safetensors" in refused(run, "-o", tmp_path / "x.safetensors", *to)
    assert "holds the run itself" in refused(run, "-o", run.parent, *to, "--replace")
    assert "not one of" in refused(run, "-o", tmp_path / "x", "--to", "onnx")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(run, "-o", tmp_path / "file", *to, "--replace")
    assert "--to and --dtype are for an MM-DiT" in refused(stage.autoencoder, "-o", tmp_path / "x", *to)
    path = run / "snapshots" / f"{STEP:08d}.safetensors"
    snap = snapshot.read(run)
    metadata = {**snap.metadata, "encoders": {**snap.metadata["encoders"], "t5": "0" * 64}}
    path.unlink()
    snapshot.write(run, STEP, snap.weights, metadata)
    assert "trained with t5 000" in refused(run, "-o", tmp_path / "x", *to)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
