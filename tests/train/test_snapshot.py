"""Which snapshots a training keeps."""

from __future__ import annotations

import json
from pathlib import Path

from stack.files import place
from stack.train import snapshot


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
