"""One file in the authors' names, as other programs read it."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autoencoders.codec import fingerprint
from stack.export.card import Subject
from stack.export.single import architecture
from stack.flow.process import FlowConfig
from stack.models import convert
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.models.presets import PRESETS
from stack.text.encoders import TextConfig, fingerprints
from stack.train import snapshot


def write_run(stage, run: Path, preset: str) -> MMDiT:
    config = MMDiTConfig(preset=preset, context_dim=128)
    network = MMDiT(config)
    network.init_weights(seed=0)
    text = TextConfig(t5=str(stage.encoders / "t5"), clip_l=str(stage.encoders / "clip_l"))
    metadata = {
        "kind": "text_to_image",
        "flow": FlowConfig().model_dump(mode="json"),
        "model": config.model_dump(mode="json"),
        "text": text.model_dump(mode="json"),
        "autoencoder": str(stage.codec),
        "encoders": {"autoencoder": fingerprint(str(stage.codec)), **fingerprints(text)},
        "sampling": {"size": [64, 32]},
    }
    snapshot.write(run, 3, network.state_dict(), metadata)
    return network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["mmdit-test", "flux-test"])
def test_it_is_read_back_and_says_what_it_is(stage, mmdit, tmp_path, preset, dtype):
    run, out = tmp_path / "run", tmp_path / "model.safetensors"
    network = write_run(stage, run, preset)
    done = mmdit("export", run, "-o", out, "--to", "single", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert out.stat().st_mode & 0o777 == 0o644

    again, config = convert.load(out)
    assert config.depth == 2
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name).to(getattr(torch, dtype))), name

    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
        spec = {key.removeprefix("modelspec."): value for key, value in metadata.items()}
        names = set(file.keys())
    expected = "joint_blocks.1.x_block.attn.qkv.weight" if preset == "mmdit-test" else "single_blocks.1.linear1.weight"
    assert expected in {name.removeprefix("model.diffusion_model.") for name in names}
    family = "sd3-d2" if preset == "mmdit-test" else "flux-d2-s2"
    assert (spec["sai_model_spec"], spec["architecture"]) == ("1.0.1", f"mmdit-{family}-w64")
    assert (spec["title"], spec["resolution"], spec["prediction_type"]) == ("run, step 3", "64x32", "rectified-flow")
    assert "for 3 steps" in spec["description"]
    assert "`pad: trim`" in spec["description"]
    assert spec["implementation"].startswith("https://github.com/")
    assert datetime.fromisoformat(spec["date"]).tzinfo is not None
    data = out.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert spec["hash_sha256"] == "0x" + hashlib.sha256(data[8 + header :]).hexdigest()

    assert mmdit("export", run, "-o", out, "--to", "single", "--dtype", dtype).returncode == 2
    assert mmdit("export", run, "-o", out, "--to", "single", "--dtype", dtype, "--replace").returncode == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == metadata  # the date is the snapshot's


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("sd3-medium", "stable-diffusion-v3-medium"),
        ("sd3.5-medium", "stable-diffusion-v3.5-medium"),
        ("sd3.5-large", "stable-diffusion-v3.5-large"),
        ("flux-dev", "flux-1-dev"),
        ("flux-schnell", "flux-1-schnell"),
        ("sd3-d18-qknorm", "mmdit-sd3-d18-w1152"),
    ],
)
def test_published_architectures_have_their_names(preset, name):
    config = MMDiTConfig(**PRESETS[preset])
    with torch.device("meta"):
        network = MMDiT(config)
    snap = snapshot.Snapshot(Path(), 1, {}, {})
    assert architecture(Subject(Path(), snap, network, TextConfig(clip_l="x"), None)) == name
