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
from stack.files import temporary_name
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


def tree(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in (run / "checkpoints").rglob("*"))


@pytest.mark.parametrize("name", ["COMPLETE", "rank-00000.safetensors", ""])
@pytest.mark.parametrize("damaged_too", [False, True])
def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, name, damaged_too):
    """A link to itself fails as a file system does that is away: neither there nor not there."""
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path, keep=5)
    for step in (3, 6, 9):
        save(store, step, engine, ema)
    if damaged_too:
        (tmp_path / "checkpoints" / "00000009" / "COMPLETE").write_bytes(b"{")
    before = tree(tmp_path)
    path = tmp_path / "checkpoints" / "00000006" / name
    path.rename(tmp_path / "aside")
    path.symlink_to(path.name)
    store = checkpoints(tmp_path)
    if damaged_too:
        with pytest.raises(OSError, match=r"00000006.*start again when.*start over"):
            store.newest()
    else:
        assert store.newest()["step"] == 9
    path.unlink()
    (tmp_path / "aside").rename(path)
    assert tree(tmp_path) == before
    assert store.newest()["step"] == (6 if damaged_too else 9)


@pytest.mark.parametrize("name", ["COMPLETE", "rank-00000.safetensors"])
def test_checkpoints_of_which_none_can_be_used_are_no_empty_folder(tmp_path, name):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    save(store, 3, engine, ema)
    save(store, 6, engine, ema)
    for step in (3, 6):
        path = tmp_path / "checkpoints" / f"{step:08d}" / name
        path.rename(path.with_suffix(".eio"))
    before = tree(tmp_path)
    with pytest.raises(OSError, match=r"none of its checkpoints can be used \(steps 3, 6\).*start over.*remove"):
        checkpoints(tmp_path).newest()
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "checkpoints")  # the user's word to start over
    assert checkpoints(tmp_path).newest() is None


def test_a_folder_of_checkpoints_that_is_away_is_no_run_without_any(tmp_path):
    """A mount point without its file system, and a link to a disk that is away."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "checkpoint": 5}\n{"step": 8, "val_loss": 1.0}\n')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(OSError, match=r"is empty, but had a checkpoint of step 5"):
        checkpoints(tmp_path).newest()
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')  # none was saved yet
    assert checkpoints(tmp_path).newest() is None
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(OSError, match="a link to a folder that is not there"):
        checkpoints(tmp_path).newest()


def test_a_damaged_checkpoint_is_neither_kept_for_a_good_one_nor_removed_before_a_newer_one_is(tmp_path):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path, keep=2)
    save(store, 3, engine, ema)
    save(store, 6, engine, ema)
    file = tmp_path / "checkpoints" / "00000006" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    store = checkpoints(tmp_path, keep=2)
    assert store.newest()["step"] == 3
    for step, there in ((4, [3, 4, 6]), (5, [4, 5, 6]), (7, [5, 7])):
        save(store, step, engine, ema)
        assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("0*")) == there


def test_a_newer_checkpoint_of_another_process_is_never_removed(tmp_path):
    engine, ema = trained(seed=1)
    for step in (3, 90):
        save(checkpoints(tmp_path), step, engine, ema)
    save(checkpoints(tmp_path, keep=1), 4, engine, ema)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("0*")) == [4, 90]


RECORDS = {
    "empty": b"",
    "cut off": b'{"format": 1, "step": 6',
    "a number": b"6",
    "null": b"null",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no files": b'{"format": 1, "step": 6, "optimizer_step": 3.0}',
    "files of another type": b'{"format": 1, "step": 6, "optimizer_step": 3.0, "files": {"name": 1}}',
    "a file without a hash": b'{"format": 1, "step": 6, "optimizer_step": 3.0, "files": [{"name": "x", "size": 1}]}',
    "a step that is text": b'{"format": 1, "step": "6", "optimizer_step": 3.0, "files": []}',
    "no step of the optimizer": b'{"format": 1, "step": 6, "files": []}',
}


@pytest.mark.parametrize("content", [*RECORDS.values(), None], ids=[*RECORDS, "a folder"])
def test_a_damaged_record_is_passed_over_with_a_line(tmp_path, capsys, content):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    save(store, 3, engine, ema)
    save(store, 6, engine, ema)
    path = tmp_path / "checkpoints" / "00000006" / "COMPLETE"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    (tmp_path / "checkpoints" / "notes").touch()
    (tmp_path / "checkpoints" / "7").mkdir()
    (tmp_path / "checkpoints" / "0000000²").mkdir()
    assert store.newest()["step"] == 3
    assert "checkpoint 6 does not verify (COMPLETE" in capsys.readouterr().err


def test_what_a_kill_left_half_written_goes(tmp_path):
    engine, ema = trained(seed=1)
    store = checkpoints(tmp_path)
    save(store, 3, engine, ema)
    temporary_name(tmp_path / "checkpoints" / "latest").write_text("0000")
    (tmp_path / "checkpoints" / "00000004.tmp").mkdir()
    store.check_space(engine, ema)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000003", "latest"]
