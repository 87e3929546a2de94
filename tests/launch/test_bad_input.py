"""A user's mistake: one clear line that names it, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def refused(done, *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for text in says:
        assert text in line


def rewrite(shard, out, change):
    """A copy of a shard in which `change(name, data)` replaces members; None drops one."""
    with tarfile.open(shard) as source, tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as target:
        for member in source:
            data = change(member.name, source.extractfile(member).read())
            if data is not None:
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))


CUT = """
import mmap, sys
from launch import cli
def read():
    with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as shard:
        file.truncate(0)
        return shard[0]
cli.run = read
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a mapped file cannot be cut")
def test_a_file_that_is_cut_while_it_is_mapped_ends_where_one_can_see(tmp_path):
    (tmp_path / "shard").write_bytes(bytes(10_000))
    command = [sys.executable, "-c", CUT, tmp_path / "shard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "in read" in done.stderr


def test_a_missing_configuration(mmdit, tmp_path):
    refused(mmdit("train", tmp_path / "none.yaml"), "none.yaml", "no such configuration file")


def test_an_autoencoder_of_grey_images(mmdit, stage, tmp_path):
    overrides = (f"run.dir={tmp_path / 'run'}", "data.channels=1")
    refused(mmdit("train", stage.folder / "autoencoder.yaml", *overrides), "data.channels=1", "takes RGB")


def test_a_missing_folder_of_shards(mmdit, stage, tmp_path):
    config = stage.folder / "preencode.yaml"
    refused(mmdit("preencode", config, f"source={tmp_path}/nowhere", f"out={tmp_path}/o"), "nowhere", "no such")


def test_a_missing_data_set(mmdit, stage, tmp_path):
    config = stage.train_config("missing", data={"path": str(tmp_path / "nowhere")})
    refused(mmdit("train", config), "nowhere", "mmdit preencode")


def test_a_missing_autoencoder(mmdit, stage, tmp_path):
    config = stage.folder / "preencode.yaml"
    done = mmdit("preencode", config, f"autoencoder={tmp_path}/nowhere", f"out={tmp_path}/o")
    refused(done, "nowhere")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr', did you mean 'lr'?"),
        ("objective.model.dept=1", "unknown key 'objective.model.dept', did you mean 'depth'?"),
        ("objective.model.preset=mmdit-tset", "did you mean 'mmdit-test'?"),
        ("objective.model.context_dim=64", "context_dim is 64, the captions need 128"),
        ("objective.model.in_channels=7", "in_channels is 7"),
        ("data.batch_size=7", "batch_size 7 is not divisible by ranks × accumulation = 1 × 2"),
        ("data.kind=images", "data.path"),
        ("objective.text.clip_tokens=false", "clip_tokens is True, this configuration has False"),
        ("objective.text.pad=full", "pad is 'trim', this configuration has 'full'"),
    ],
)
def test_a_wrong_value(mmdit, stage, tmp_path, override, says):
    config = stage.train_config("wrong", run={"dir": str(tmp_path / "run")}, parallel={"accumulate": 2})
    refused(mmdit("train", config, override), says)


def test_a_manifest_of_another_encoder(mmdit, stage, tmp_path):
    from stack.text.encoders import write_untrained_encoders

    other = write_untrained_encoders(tmp_path / "encoders", seed=1)
    config = stage.train_config("other", run={"dir": str(tmp_path / "run")})
    done = mmdit("train", config, f"objective.text.t5={other.t5}")
    recorded = json.loads((stage.encoded / "manifest.json").read_text())["encoders"]["t5"]
    refused(done, "encoders.t5", recorded)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_encoder_that_the_configuration_leaves_out(mmdit, stage, tmp_path):
    """Data with T5 and a configuration without: training would use what sampling does not have."""
    config = stage.train_config("fewer", run={"dir": str(tmp_path / "run")})
    refused(mmdit("train", config, "objective.text.t5=null"), "encoders.t5", "None")


def test_the_source_is_not_overwritten(mmdit, stage):
    before = {path.name: path.read_bytes() for path in stage.shards.iterdir()}
    refused(mmdit("preencode", stage.folder / "preencode.yaml", f"out={stage.shards}"), "would be overwritten")
    assert {path.name: path.read_bytes() for path in stage.shards.iterdir()} == before


def test_a_failed_start_does_not_claim_the_folder(mmdit, stage, tmp_path):
    config = stage.train_config("retried", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    refused(mmdit("train", config, f"data.path={tmp_path}/typo"), "typo")
    assert mmdit("train", config).returncode == 0


def test_a_folder_in_use(mmdit, stage, tmp_path):
    from stack.files import lock

    config = stage.train_config("used", run={"dir": str(tmp_path / "run")})
    with lock(tmp_path / "run" / ".lock"):
        refused(mmdit("train", config), "another process is training in this folder")


def test_a_link_that_is_pointed_at_another_run(stage, training, tmp_path):
    """While a run lives: its checkpoints and their retention stay in its own folder."""
    own, other, link = tmp_path / "own", tmp_path / "other", tmp_path / "link"
    for folder in (own, other):
        folder.mkdir()
    link.symlink_to(own)
    (other / "checkpoints" / "00000001").mkdir(parents=True)
    (other / "checkpoints" / "00000001" / "COMPLETE").write_text("{}")
    keeping = {"every": 5, "keep": 1}
    sections = {"run": {"dir": str(link)}, "schedule": {"steps": 60}, "checkpoint": keeping}
    run = training(stage.train_config("linked", **sections), 1)
    run.wait_for_step(2)
    link.unlink()
    link.symlink_to(other)
    run.finish()
    assert [path.name for path in other.rglob("*")] == ["checkpoints", "00000001", "COMPLETE"]
    assert (own / "checkpoints" / "00000060" / "COMPLETE").exists()
    assert (own / "snapshots" / "00000060.safetensors").exists()


def test_a_preview_that_the_model_cannot_draw(mmdit, stage, tmp_path):
    config = stage.train_config("large", run={"dir": str(tmp_path / "run")})
    refused(mmdit("train", config, "objective.preview.size=[32,4096]"), "32×4096", "position table ends at")


def test_shards_of_another_configuration_are_not_overwritten(mmdit, stage):
    before = {path.name: path.read_bytes() for path in stage.encoded.glob("0*")}
    refused(mmdit("preencode", stage.folder / "preencode.yaml", "buckets.resolution=64"), "give `out` a new folder")
    assert {path.name: path.read_bytes() for path in stage.encoded.glob("0*")} == before


def test_a_run_folder_of_another_configuration(mmdit, stage, tmp_path):
    config = stage.train_config("twice", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    assert mmdit("train", config).returncode == 0
    refused(mmdit("train", config, "optim.lr=0.5"), "differs in optim")


def test_bad_samples_are_listed_and_the_others_kept(mmdit, stage, tmp_path):
    """An empty caption, a corrupt PNG (header and pixels) and a missing caption among good samples."""
    (tmp_path / "shards").mkdir()

    def change(name: str, data: bytes) -> bytes | None:
        if name == "000000001.txt":
            return b"  \n"
        if name == "000000002.png":
            return data[:60] + bytes(20) + data[80:]
        if name == "000000003.png":
            return b"not a picture"
        return None if name == "000000004.txt" else data

    rewrite(stage.shards / "00000.tar", tmp_path / "shards" / "00000.tar", change)
    config = tmp_path / "preencode.yaml"
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    config.write_text(
        yaml.safe_dump(
            {**values, "source": str(tmp_path / "shards"), "out": str(tmp_path / "out"), "max_rejected": 0.1}
        )
    )
    done = mmdit("preencode", config)
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in listed}
    assert set(reasons) == {f"00000000{n}" for n in (1, 2, 3, 4)}
    assert "empty caption" in reasons["000000001"]
    assert "no caption" in reasons["000000004"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["rejected"]) == (36, 4)

    config = stage.folder / "autoencoder.yaml"
    more = ("schedule.steps=9", "data.max_rejected=0.1")
    done = mmdit("train", config, f"run.dir={tmp_path}/ae", f"data.source={tmp_path}/shards", *more)
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "ae" / "rejected.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in listed} == {"000000002", "000000003"}  # which need no caption


def test_a_sample_size_that_does_not_divide(mmdit, stage, tmp_path):
    config = stage.train_config("sized", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    assert mmdit("train", config).returncode == 0
    refused(mmdit("sample", tmp_path / "run", "a star", "--size", "33x32"), "33×32", "multiples of 8")
    refused(mmdit("sample", tmp_path / "run"), "PROMPT")
    refused(mmdit("sample", tmp_path / "nothing", "a star"), "no such run folder")
    refused(mmdit("evaluate", tmp_path / "run", "--step", "7"), "no snapshot of step 7")


def test_an_unknown_preset(mmdit):
    refused(mmdit("model", "sd3-d25"), "unknown preset 'sd3-d25', did you mean 'sd3-d24'?")
