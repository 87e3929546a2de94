"""Which snapshots a training keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stack.config import UserError
from stack.files import place
from stack.train import snapshot
from stack.train.classifier import load_classifier


def write_empty(run: Path, *steps: int) -> None:
    (run / "snapshots").mkdir()
    for step in steps:
        (run / "snapshots" / f"{step:08d}.safetensors").touch()


def test_retention_keeps_the_newest_and_every_nth(tmp_path):
    write_empty(tmp_path, *range(1, 11))
    snapshot.retire(tmp_path, 8, snapshot.SnapshotConfig(), batch_size=8)
    assert snapshot.steps(tmp_path) == list(range(1, 11))
    snapshot.retire(tmp_path, 8, snapshot.SnapshotConfig(keep=2, keep_every="24 samples"), batch_size=8)
    assert snapshot.steps(tmp_path) == [3, 6, 7, 8, 9, 10]  # 9 and 10 are of a future that is trained anew
    snapshot.retire(tmp_path, 8, snapshot.SnapshotConfig(keep=100), batch_size=8)
    assert snapshot.steps(tmp_path) == [3, 6, 7, 8, 9, 10]


def test_a_lease_spares_a_snapshot_while_its_owner_lives(tmp_path):
    write_empty(tmp_path, 1, 2, 3, 4)
    config, lease = snapshot.SnapshotConfig(keep=1), "00000001.0123456789ab"
    with snapshot.leases(tmp_path).hold(lease) as mine:
        assert mine
        snapshot.retire(tmp_path, 4, config, batch_size=8)
        assert snapshot.steps(tmp_path) == [1, 4]
    dead = {"place": place(), "pid": 2**22 + 1, "started": 0.0}  # beyond the kernel's largest
    (tmp_path / "snapshots" / ".claims" / lease).write_text(json.dumps(dead))
    snapshot.retire(tmp_path, 4, config, batch_size=8)
    assert snapshot.steps(tmp_path) == [4]


def test_a_training_keeps_the_newest_snapshots(stage, mmdit):
    config = stage.train_config("few", snapshot={"every": 1, "keep": 2})
    assert mmdit("train", config).returncode == 0
    assert snapshot.steps(stage.folder / "few") == [3, 4]


METADATA = {
    "empty": "",
    "cut off": '{"kind": "autoenco',
    "a number": "7",
    "null": "null",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no kind": '{"step": 3}',
    "no step": '{"kind": "classifier"}',
    "a step that is text": '{"kind": "classifier", "step": "3"}',
}


@pytest.mark.parametrize("config", METADATA.values(), ids=METADATA)
def test_damaged_metadata_is_one_line(tmp_path, config):
    (tmp_path / "snapshots").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "snapshots" / "00000003.safetensors", metadata={"config": config})
    with pytest.raises(UserError, match=r"00000003\.safetensors: not a snapshot"):
        snapshot.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{\xff}     ", b"\xff" * 100, None])
def test_a_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "snapshots" / "00000003.safetensors"
    path.mkdir(parents=True) if content is None else (path.parent.mkdir(), path.write_bytes(content))
    with pytest.raises(UserError, match=r"00000003\.safetensors: not a snapshot"):
        snapshot.read(tmp_path)


WEIGHTS = {
    "x": torch.randn(3, 4),
    "half": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(7),
    "none": torch.zeros(0, 2),
    "turned": torch.randn(4, 3).T,
}


def test_any_bit_that_changes_is_found(tmp_path):
    path = snapshot.write(tmp_path, 3, {k: x.contiguous() for k, x in WEIGHTS.items()}, {"kind": "x", "size": [8, 8]})
    read = snapshot.read(tmp_path)
    assert (read.step, read.metadata) == (3, {"kind": "x", "size": [8, 8], "step": 3})
    assert all(torch.equal(read.weights[name], weight) for name, weight in WEIGHTS.items())
    whole = path.read_bytes()
    places = {*range(8, len(whole), 17), len(whole) - 1, whole.index(b"[8, 8]") + 1}
    for at in places - set(range(whole.index(b"sha256"), whole.index(b"sha256") + 6)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"00000003\.safetensors"):
            snapshot.read(tmp_path)


def test_a_snapshot_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "snapshots").mkdir()
    config = json.dumps({"kind": "classifier", "step": 3, "objective": {"classes": "many"}})
    save_file({"x": torch.zeros(1)}, tmp_path / "snapshots" / "00000003.safetensors", metadata={"config": config})
    snap = snapshot.read(tmp_path)
    assert (snap.step, list(snap.weights)) == (3, ["x"])
    with pytest.raises(UserError, match="its metadata has no 'channels'"):
        snap.metadata["channels"]
    with pytest.raises(UserError, match=r"00000003\.safetensors: its metadata is damaged, objective\.classes"):
        load_classifier(tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match="not the weights of the model"):
        snap.fill(torch.nn.Linear(2, 2))


def test_odd_names_are_no_snapshots(tmp_path):
    write_empty(tmp_path, 3)
    for name in ("7", "0000000²", "000000004", "notes"):
        (tmp_path / "snapshots" / f"{name}.safetensors").touch()
    assert snapshot.steps(tmp_path) == [3]
