"""The checkpoint protocol on one process: publication, verification, retention, failure."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stack.config import UserError
from stack.parallel.ema import Ema, EmaConfig
from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig
from stack.train import checkpoint
from stack.train.checkpoint import CheckpointConfig, Checkpoints


def trained(seed: int, steps: int = 3, width: int = 8) -> tuple[LocalEngine, Ema]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2))
    engine = LocalEngine(network, OptimConfig(lr=0.1), ParallelConfig(), torch.device("cpu"))
    ema = Ema(engine, EmaConfig(decay=0.5))
    for step in range(steps):
        advance(engine, ema, step)
    return engine, ema


def advance(engine: LocalEngine, ema: Ema, step: int) -> float:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    loss = (engine.network(x) - 1).square().mean()
    engine.backward(loss)
    assert engine.step(0.1).applied
    ema.update(step + 1)
    return float(loss.detach())


def checkpoints(run: Path, **keys: int) -> Checkpoints:
    return Checkpoints(run, CheckpointConfig(keep=keys.get("keep", 2)), keys.get("keep_every", 0))


def save(store: Checkpoints, step: int, engine: LocalEngine, ema: Ema, **state: object) -> bool:
    store.save(step, engine, ema, state)
    return store.wait()


def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    engine, ema = trained(seed=1)
    assert save(checkpoints(tmp_path), 3, engine, ema, note="kept")
    expected = [advance(engine, ema, step) for step in range(3, 6)]

    other, other_ema = trained(seed=2, steps=0)
    record = checkpoints(tmp_path).newest()
    assert (record["step"], record["note"]) == (3, "kept")
    checkpoints(tmp_path).load(record, other, other_ema)
    assert [advance(other, other_ema, step) for step in range(3, 6)] == expected
    for (_, shadow), (_, other_shadow) in zip(ema.pairs, other_ema.pairs, strict=True):
        assert torch.equal(shadow, other_shadow)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no COMPLETE", "garbage", "old format"])
def test_resume_takes_the_newest_that_verifies(tmp_path, damage):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    save(store, 3, engine, ema)
    save(store, 6, engine, ema)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000006\n"
    newest = tmp_path / "checkpoints" / "00000006"
    file, complete = newest / "rank-00000.safetensors", newest / "COMPLETE"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "remove":
        file.unlink()
    elif damage == "no COMPLETE":
        complete.unlink()
    elif damage == "garbage":
        complete.write_bytes(b"\xff\xfe{]")
    else:
        complete.write_text(json.dumps({**json.loads(complete.read_text()), "format": 0}))
    assert store.newest()["step"] == 3


def test_retention_keeps_the_last_and_each_nth(tmp_path):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        save(store, step, engine, ema)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("0*")) == [4, 6, 7]


def test_what_did_not_verify_does_not_push_out_what_does(tmp_path):
    """Resumed at 3 since 9 is broken: after saving 4, both 3 and 4 stand and 9 is gone."""
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path, keep=2)
    save(store, 3, engine, ema)
    save(store, 9, engine, ema)
    (tmp_path / "checkpoints" / "00000009" / "COMPLETE").unlink()
    assert store.newest()["step"] == 3
    save(store, 4, engine, ema)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("0*")) == [3, 4]


def test_a_failed_save_spoils_nothing(tmp_path, capsys):
    """The file may not grow beyond a limit, as on a full disk: the older checkpoint stays and no rest is left."""
    engine, ema = trained(seed=1, width=4096)
    store = checkpoints(tmp_path)
    assert save(store, 3, engine, ema)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert not save(store, 6, engine, ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "checkpoint 6 failed" in capsys.readouterr().err
    assert store.newest()["step"] == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("0")] == ["00000003"]


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    """The training goes on while the file is written; a second save waits for the first."""
    engine, ema = trained(seed=1)
    begun, go_on = threading.Event(), threading.Event()
    write = checkpoint._write

    def slow(path: Path, parts: list) -> dict:
        begun.set()
        assert go_on.wait(60)
        return write(path, parts)

    monkeypatch.setattr(checkpoint, "_write", slow)
    store = checkpoints(tmp_path)
    expected = {name: p.detach().clone() for name, p in engine.network.named_parameters()}
    store.save(3, engine, ema, {})
    store.settle()
    advance(engine, ema, 3)
    assert begun.wait(60)
    assert any(not torch.equal(p, expected[name]) for name, p in engine.network.named_parameters())
    assert store.newest() is None
    threading.Timer(0.2, go_on.set).start()
    store.save(4, engine, ema, {})
    assert (tmp_path / "checkpoints" / "00000003" / "COMPLETE").exists()
    assert store.wait()

    other, other_ema = trained(seed=2, steps=0)
    record, _ = checkpoint._read_record(tmp_path / "checkpoints" / "00000003")
    store.load(record, other, other_ema)
    assert all(torch.equal(p, expected[name]) for name, p in other.network.named_parameters())


def test_training_waits_for_the_copy_before_its_update(stage, mmdit, tmp_path, monkeypatch):
    """A copy that takes longer than a step: what is saved is the state after its step all the same."""
    config = stage.train_config("slow-copy", checkpoint={"every": 1, "keep": 4})
    whole = mmdit("train", config, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    copy = Checkpoints._copy

    def late(self: Checkpoints, *arguments: object) -> None:
        time.sleep(0.5)
        copy(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_copy", late)
    assert mmdit("train", config, f"run.dir={tmp_path / 'late'}").returncode == 0
    for step in range(1, 5):
        name = f"checkpoints/{step:08d}/rank-00000.safetensors"
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_disk_without_room_is_said_before_the_first_step_and_at_each_save(tmp_path, monkeypatch, capsys):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    assert save(store, 3, engine, ema)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"needs .* GB.*run.dir"):
        store.check_space(engine, ema)
    assert not save(store, 6, engine, ema)
    assert "checkpoint 6 failed" in capsys.readouterr().err
    assert store.newest()["step"] == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    save(store, 3, engine, ema)
    other, other_ema = trained(seed=1, steps=0, width=16)
    with pytest.raises(UserError, match="another model"):
        store.load(store.newest(), other, other_ema)
