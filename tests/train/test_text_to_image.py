"""Text to image on objectives and networks beside the default: from the YAML to resumed trainings, samples, results."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stack.config import load
from stack.flow.noise import NoisePlan
from stack.flow.process import Example, FlowConfig
from stack.log import read_metrics
from stack.models.convert import save
from stack.models.mmdit import Block, MMDiT, MMDiTConfig
from stack.nn import attention
from stack.parallel import engine
from stack.train import loop
from stack.train.recipe import TrainConfig, build

UNET = {
    "kind": "unet",
    "block_out_channels": [16, 32],
    "attention": [True, True],
    "layers_per_block": 1,
    "num_heads": 2,
    "context_dim": 128,
    "norm_groups": 8,
}
OBJECTIVES = {
    "ddpm": {"path": {"kind": "ddpm"}, "prediction": "eps", "timesteps": {"kind": "uniform"}},
    "vp": {"path": {"kind": "vp"}, "prediction": "v", "weight": {"kind": "min_snr"}},
    "edm": {
        "path": {"kind": "edm"},
        "prediction": "edm",
        "sigma_data": 1.0,
        "timesteps": {"kind": "log_normal", "mean": -1.2, "std": 1.2},
    },
    "elbo": {
        "path": {"kind": "cosine"},
        "prediction": "eps",
        "timesteps": {"stratified": True},
        "weight": {"kind": "elbo"},
    },
    "transport": {"coupling": {"kind": "optimal_transport"}, "prediction": "x", "weight": {"kind": "velocity"}},
    "immiscible": {"coupling": {"kind": "immiscible"}},
    "unet": {"model": UNET},
}


def configure(stage, name: str, objective: dict | None = None, **sections: dict) -> Path:
    whole = yaml.safe_load(stage.train_config("text-base").read_text())["objective"]
    return stage.train_config(name, objective={**whole, **(objective or {})}, **sections)


@pytest.fixture(scope="module")
def trained(stage, mmdit):
    """A function that trains one of OBJECTIVES, once."""
    done = {}

    def train(name: str):
        if name not in done:
            config = configure(stage, f"text-{name}", OBJECTIVES[name])
            ended = mmdit("train", config)
            assert ended.returncode == 0, ended.stderr
            done[name] = stage.folder / f"text-{name}"
        return done[name]

    return train


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_and_is_evaluated(trained, mmdit, name):
    run = trained(name)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    done = mmdit("evaluate", run)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(json.loads(done.stdout)["val_loss"])
    assert np.asarray(Image.open(run / "samples" / "00000004.png")).std() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", ("--solver", "ddpm")),
        ("vp", ("--solver", "dpm_solver_pp_2m", "--set", "guidance.rescale=0.7")),
        ("edm", ("--solver", "heun", "--set", "guidance.interval=[0.2,0.8]")),
        ("edm", ("--solver", "langevin", "--set", "langevin_steps=2")),
        ("immiscible", ("--solver", "dopri5", "--set", "rtol=1e-2", "--set", "atol=1e-2")),
        ("unet", ("--solver", "midpoint", "--set", "guidance.apg.eta=0.5")),
    ],
)
def test_samples_by_any_solver_and_guidance(trained, mmdit, tmp_path, name, options):
    out = tmp_path / "out.png"
    done = mmdit("sample", trained(name), "a red circle", "--steps", 3, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (32, 32)


def test_autoguidance_leads_away_from_the_snapshot_that_is_named(stage, mmdit, tmp_path):
    sections = {"optim": {"lr": 1e-2}, "snapshot": {"every": 2}, "schedule": {"steps": 6}}
    config, out, images = configure(stage, "text-weak", **sections), tmp_path / "out.png", {}
    assert mmdit("train", config).returncode == 0
    for name, options in {"none": (), "2": ("--weak", 2), "4": ("--weak", 4), "6": ("--weak", 6)}.items():
        scale = ("--set", "guidance.autoguidance=20") if options else ()
        run = stage.folder / "text-weak"
        done = mmdit("sample", run, "a red circle", "--steps", 3, "--guidance", 1, "-o", out, *options, *scale)
        assert done.returncode == 0, done.stderr
        images[name] = np.asarray(Image.open(out)).astype(int)
    assert (images["6"] == images["none"]).all()
    assert (images["4"] != images["none"]).any()
    assert (images["2"] != images["4"]).any()


class Recorder(torch.nn.Module):
    """A network that says 0 and remembers what it was asked."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.asked = inputs
        return torch.zeros_like(inputs[0])


def test_the_loss_is_the_flows_on_drawn_latents(stage):
    """Its path, coupling and weight, and the network's input: each is another than the default's."""
    keys = {"path": {"kind": "edm"}, "prediction": "edm", "sigma_data": 1.0, "weight": {"kind": "min_snr"}}
    keys |= {"coupling": {"kind": "immiscible"}, "timesteps": {"kind": "log_normal", "mean": -1.2, "std": 1.2}}
    data, made = build(load(TrainConfig, configure(stage, "text-value", keys)), torch.device("cpu"))
    flow, network = FlowConfig.model_validate(keys), Recorder()
    batch = next(iter(data.loader(0, 1, 0, 1, 1))).to("cpu")
    draws = NoisePlan(0).at(0, batch.positions)
    posterior = draws.normal("posterior", batch.mean_BCHW.shape[1:])
    drawn = batch.mean_BCHW + (batch.logvar_BCHW / 2).exp() * posterior
    x0 = (drawn - data.manifest.shift) * data.manifest.scale

    def check(loss_B: torch.Tensor, example: Example) -> None:
        sigma = flow.path.at(example.t_B).b.float().reshape(-1, 1, 1, 1)
        torch.testing.assert_close(network.asked[1], example.t_B)
        torch.testing.assert_close(network.asked[0], example.x_t / (1 + sigma**2).sqrt())
        torch.testing.assert_close(loss_B, flow.loss_B(torch.zeros_like(x0), example))

    eps = flow.coupling.noise(x0, draws, 8)
    losses = made.loss(network, batch, draws)
    check(losses.by_time[0], flow.example(x0, eps, flow.times(draws, 8)))
    torch.testing.assert_close(losses.total, losses.by_time[0].mean())
    check(made.validate(network, batch, draws), flow.validation_example(x0, eps, batch.positions))


def test_a_resumed_training_of_another_objective_is_exact(stage, training, history):
    sections = {"schedule": {"steps": 12}, "checkpoint": {"every": 4}}
    objective = {**OBJECTIVES["edm"], "coupling": {"kind": "immiscible"}}
    whole = training(configure(stage, "text-whole", objective, **sections), 1)
    whole.finish()
    cut = configure(stage, "text-cut", objective, **sections)
    first = training(cut, 1)
    first.wait_for_step(6)
    first.kill()
    training(cut, 1).finish()
    assert history(first.run) == history(whole.run)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("objective.coupling.kind=paired",), "latents have no second image"),
        (("objective.coupling.kind=optimal_transport", "parallel.accumulate=2"), "pairs the whole batch of 8"),
        (("objective.model.kind=dit",), "knows labels, not captions"),
        (("objective.path.kind=straight",), "objective.path"),
        (("objective.preview.solver=langevin",), "langevin wants path.kind ve or edm, got linear"),
        (("objective.preview.guidance.autoguidance=2",), "guidance.autoguidance: a training has nothing"),
        (("objective.preview.guidance.apg.eta=0", "objective.preview.guidance.cfg_zero.zero_above=1"), "exclude each"),
    ],
)
def test_what_cannot_be_says_why(stage, mmdit, overrides, says):
    done = mmdit("train", configure(stage, "text-wrong"), *overrides)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_only_what_others_expect_is_exported_for_them(trained, mmdit, tmp_path):
    done = mmdit("export", trained("vp"), "-o", tmp_path / "vp", "--to", "diffusers")
    assert (done.returncode, "trained on path vp with prediction v" in done.stderr) == (2, True)
    done = mmdit("export", trained("unet"), "-o", tmp_path / "unet.safetensors", "--to", "single")
    assert (done.returncode, "write an MM-DiT" in done.stderr) == (2, True)
    assert mmdit("export", trained("vp"), "-o", tmp_path / "stack").returncode == 0


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def test_compute_reaches_the_network_that_is_trained(stage, mmdit, monkeypatch):
    """And changes nothing in what is learnt."""
    assert mmdit("train", stage.train_config("plain")).returncode == 0
    networks = []

    def build_engine(network, *arguments):
        networks.append(network)
        return engine.build(network, *arguments)

    monkeypatch.setattr(loop, "engines", SimpleNamespace(build=build_engine))
    keys = ("compute.attention=sdpa", "compute.recompute=selective", "compute.recompute_every=2")
    done = mmdit("train", stage.train_config("computed"), *keys)
    assert done.returncode == 0, done.stderr
    assert networks[0].attention == "sdpa"
    blocks = [block for block in networks[0].modules() if isinstance(block, Block)]
    assert [block.recompute is None for block in blocks] == [False, True]
    assert losses(stage.folder / "computed") == pytest.approx(losses(stage.folder / "plain"), rel=1e-4)
    assert all(line["tflops_per_s"] > 0 for line in read_metrics(stage.folder / "computed") if "loss" in line)


def test_snapshots_are_looked_at_with_what_runs_for_them(stage, mmdit, monkeypatch):
    """In float32, where the training's bfloat16 has a backend that takes no other."""

    def refuses(device, dtype, head_size, backward):
        return None if dtype == torch.bfloat16 else f"needs bfloat16, got {dtype}"

    varlen = attention._BACKENDS["varlen"]
    monkeypatch.setitem(attention._BACKENDS, "varlen", varlen._replace(refuses=refuses))
    attention.choose.cache_clear()
    try:
        done = mmdit("train", stage.train_config("half"), "compute.attention=varlen", "parallel.precision=bf16")
    finally:
        attention.choose.cache_clear()
    assert done.returncode == 0, done.stderr
    assert any("val_loss" in line for line in read_metrics(stage.folder / "half"))
    assert "attention: sdpa on cpu in float32" in done.stderr


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("objective", "overrides", "says"),
    [
        ({}, ("compute.attention=xformers",), "compute.attention=xformers: needs a GPU, got cpu"),
        ({}, ("compute.attention=flex",), "compute.attention=flex: has no backward pass on cpu"),
        ({}, ("compute.attention=reference", "compute.recompute=selective"), "not of attention=reference"),
        (
            {},
            ("compute.compile=true", "parallel.engine=zero", "parallel.zero_stage=3"),
            "compute.compile and parallel.zero_stage=3 exclude each other",
        ),
        ({"model": UNET}, ("compute.recompute=all",), "compute is for an MM-DiT: objective.model.kind=unet"),
        ({"model": UNET}, ("init.from=x",), "init.from is for an MM-DiT: objective.model.kind=unet"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_built(stage, mmdit, objective, overrides, says, options):
    config = configure(stage, "uncomputed", objective, data={"path": "nowhere"})
    done = mmdit("train", config, *overrides, *options)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not (stage.folder / "uncomputed").exists()


@pytest.mark.parametrize(("override", "key"), [("compute.recompute=all", "compute"), ("init.from=x", "init.from")])
def test_another_objective_has_no_use_for_them(stage, mmdit, tmp_path, override, key):
    done = mmdit("train", stage.folder / "autoencoder.yaml", f"run.dir={tmp_path / 'run'}", override)
    assert done.returncode == 2, done.stderr
    assert f"{key} is for an MM-DiT: objective.kind=autoencoder" in done.stderr


def test_positions_that_are_not_used_do_not_make_another_model(stage, mmdit, tmp_path):
    """A file of a model with rotary positions has no word of a table."""
    model = {"preset": "flux-test", "context_dim": 128, "pooled_dim": 128, "position_table_size": 64}
    network = MMDiT(MMDiTConfig(**model))
    network.init_weights(0)
    save(network, tmp_path / "model", "diffusers")
    config = configure(stage, "rotary", {"model": model}, init={"from": str(tmp_path / "model")})
    done = mmdit("train", config, "schedule.steps=1", "schedule.warmup=1")
    assert done.returncode == 0, done.stderr
