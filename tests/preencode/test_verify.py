"""`mmdit preencode --verify`: what is stored is what encoding again gives, and what is not so is named."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save

from stack import config as configuration
from stack.data.schema import load_manifest, to_float8
from stack.data.shards import index_shards
from stack.preencode.job import PreencodeConfig
from stack.preencode.verify import Agreement, _agree, verify


def _encoded(stage, folder: Path, mmdit: Callable, *settings: str) -> tuple[Path, PreencodeConfig]:
    """The configuration's file, of samples encoded into `folder`/out with these settings."""
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "out": str(folder / "out")}))
    done = mmdit("preencode", path, *settings)
    assert done.returncode == 0, done.stderr
    return path, configuration.load(PreencodeConfig, path, settings)


def _change(folder: Path, key: str, change: Callable[[dict, dict], None], shard: str = "00001.tar") -> None:
    """Rewrite one stored sample, as if it had always stood there."""
    with tarfile.open(folder / shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    tensors, facts = load(members[f"{key}.safetensors"]), json.loads(members[f"{key}.json"])
    change(tensors, facts)
    members[f"{key}.safetensors"] = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    members[f"{key}.json"] = json.dumps(facts).encode()
    with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][shard]["sha256"] = hashlib.sha256((folder / shard).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    index_shards(folder, rebuild=True)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("dtype=float32", "t5_dtype=float8", "captions.txt=txt", "captions.key=json.key", "captions.none=json.nothing"),
        ("t5_dtype=float8", "text.clip_tokens=false", "text.clip_g=null"),
        ("text.pad=full", "text.t5=null", "batch_size=7"),
    ],
)
def test_what_was_encoded_is_found_again(stage, tmp_path: Path, mmdit: Callable, settings: tuple[str, ...]) -> None:
    path, config = _encoded(stage, tmp_path, mmdit, *settings)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    result = verify(config, 31)
    assert (result.samples, result.failures) == (31, [])
    found = set(result.tensors)
    assert {"latent_mean", "latent_logvar", "pooled"} <= found
    assert ("pooled.1" in found, "t5_scale" in found) == ("captions.txt=txt" in settings, "t5_dtype=float8" in settings)
    for name, tensor in result.tensors.items():
        assert tensor.cosine > 0.9999, name
        assert tensor.largest < 0.05, name
        assert tensor.equal > 0.9 * tensor.values or name == "t5_scale" or config.dtype == "float32", name
    done = mmdit("preencode", path, *settings, "--verify", 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out: 20 samples encoded again, all agree"
    assert {line.split()[0] for line in done.stdout.splitlines()[1:-1]} == found
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before, "nothing is written"


def _shift(name: str, by: float) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        tensors[name][0] += by

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_shift("latent_mean", 0.1), "latent_mean differs by 0.1"),
        (_shift("t5", float("nan")), "t5 has 128 non-finite values, again 0"),
        (_shift("pooled", 0.3), "pooled differs by 0.3"),
        (lambda tensors, facts: tensors.update(t5=tensors["t5"].flip(0)), "t5 differs by"),
        (lambda tensors, facts: tensors.update(t5=tensors["t5"][1:]), "t5 is torch.bfloat16 ["),
        (lambda tensors, facts: tensors.pop("clip_l"), "again clip_g, clip_l, latent_logvar"),
        (lambda tensors, facts: facts.update(caption="another"), "JSON has {"),
    ],
)
def test_a_sample_that_is_something_else_is_named(stage, tmp_path: Path, mmdit: Callable, change, says: str) -> None:
    shutil.copytree(stage.encoded, tmp_path / "out", ignore=shutil.ignore_patterns(".claims"))
    config = tmp_path / "config.yaml"
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    config.write_text(yaml.safe_dump({**values, "out": str(tmp_path / "out")}))
    _change(tmp_path / "out", "000000044", change)
    done = mmdit("preencode", config, "--verify", 200)  # more than there are
    assert done.returncode == 1, done.stderr
    *_, named, summary = done.stdout.splitlines()
    assert named.startswith("00001.tar: 000000044: ")
    assert says in named
    assert summary == f"{tmp_path}/out: 96 samples encoded again, 1 beyond what rounding explains"


def test_samples_are_spread_evenly(stage, tmp_path: Path, mmdit: Callable) -> None:
    """Of 96 samples, 3: the middle ones of each third."""
    _, config = _encoded(stage, tmp_path, mmdit)
    for number, key in ((0, "000000016"), (1, "000000048"), (2, "000000080")):
        _change(tmp_path / "out", key, _shift("pooled", 1), f"{int(key) // 40:05}.tar")
        assert len(verify(config, 3).failures) == number + 1


def test_rounding_is_told_from_change() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(12, 512, generator=generator) * torch.logspace(-3, 3, 512)
    noisy = exact + 1e-6 * exact.square().mean(-1, keepdim=True).sqrt() * torch.randn(12, 512, generator=generator)
    for store in (lambda t: (t.bfloat16(), None), to_float8):
        agreement = Agreement()
        one, other = store(exact), store(noisy)
        assert _agree("t5", one, other, 2.0**-12, agreement) == ""
        assert agreement.values == 12 * 512
        assert agreement.equal < agreement.values, "some are rounded the other way"
        changed = exact.clone()
        changed[3, 400] *= 1.5
        assert "in 1 of 6,144 values" in _agree("t5", one, store(changed), 2.0**-12, Agreement())
        assert _agree("t5", one, store(exact.roll(1, 0)), 2.0**-2, Agreement())


def test_another_configuration_is_refused(stage, tmp_path: Path, mmdit: Callable) -> None:
    path, _ = _encoded(stage, tmp_path, mmdit)
    shutil.copytree(stage.shards, tmp_path / "source")
    (tmp_path / "source" / "00002.tar").unlink()
    for override, says in [
        ("text.t5=null", f"encoders.t5 is '{load_manifest(tmp_path / 'out').encoders['t5']}', this configuration has"),
        ("text.pad=full", "pad is 'trim', this configuration has 'full'"),
        ("min_side=3", "made from other sources or settings"),
        (f"source={tmp_path}/source", "made from other sources or settings"),
        (f"out={tmp_path}/nowhere", "no such folder; make it with `mmdit preencode`"),
    ]:
        done = mmdit("preencode", path, override, "--verify", 2)
        assert done.returncode == 2
        assert says in done.stderr
    assert mmdit("preencode", path, "--verify", 0).returncode == 2
    (tmp_path / "out" / "manifest.json").unlink()
    done = mmdit("preencode", path, "--verify", 2)
    assert done.returncode == 2
    assert "pre-encoding has not finished" in done.stderr
