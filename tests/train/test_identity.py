"""A run resumes with equal inputs wherever they are stored, and with no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stack.data.dataset import ImageData, ImageDataset
from stack.data.identity import DataIdentity, Part
from stack.data.shards import ShardSet, index_shards
from stack.train import identity

SHORT = ("schedule.steps=4", "checkpoint.every=2", "checkpoint.keep=9", "log.keys=true")


@pytest.fixture
def shards(stage, tmp_path) -> Path:
    """A copy of the drawn scenes that can be moved and spoilt."""
    shutil.copytree(stage.shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def train(stage, mmdit, tmp_path):
    """Train an autoencoder for four steps on `source`; or resume after its second."""

    def command(source, *overrides):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004", ignore_errors=True)
        config = stage.folder / "autoencoder.yaml"
        return mmdit("train", config, f"run.dir={tmp_path / 'run'}", f"data.source={source}", *SHORT, *overrides)

    return command


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def refused(done, *words: str) -> str:
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mmdit: "), done.stderr
    for word in words:
        assert word in line, done.stderr
    return line


def resumed(done) -> None:
    assert done.returncode == 0, done.stderr
    assert "going on after step 2" in done.stderr


def test_equal_shards_resume_wherever_they_are(train, shards, tmp_path, history, monkeypatch):
    assert train(shards).returncode == 0
    before = history(tmp_path / "run")
    (tmp_path / "link").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    names = ",".join(path.stem for path in sorted(shards.glob("*.tar")))
    for source in (f"{shards}/", "shards", tmp_path / "link", shards / "*.tar", f"'{shards}/{{{names}}}.tar'"):
        resumed(train(source))
        assert history(tmp_path / "run") == before
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, shard in enumerate(sorted(shards.glob("*.tar"))):  # without indices, under other names and times
        shutil.copyfile(shard, moved / f"part-{number}.tar")
    shutil.rmtree(shards)
    resumed(train(moved))
    assert history(tmp_path / "run") == before


def test_other_shards_are_refused_before_anything_is_written(train, shards, tmp_path):
    assert train(shards).returncode == 0
    first, second, *_ = sorted(shards.glob("*.tar"))
    kept = {path: path.read_bytes() for path in shards.iterdir()}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004")
    before = files(tmp_path / "run")

    def restore():
        shutil.rmtree(shards)
        shards.mkdir()
        for path, data in kept.items():
            path.write_bytes(data)

    def grow():
        shutil.copy(first, shards / "99999.tar")

    def lose():
        second.unlink()

    def edit():
        """A caption of the same length, and the index removed that would tell."""
        first.write_bytes(first.read_bytes().replace(b"circle", b"cirkle"))
        first.with_name(f"{first.stem}.index.safetensors").unlink()

    def swap():
        contents = first.read_bytes(), second.read_bytes()
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        for path in shards.glob("*.index.safetensors"):
            path.unlink()

    for change, words in (
        (grow, ("added: 99999.tar",)),
        (lose, ("missing: ", second.name)),
        (edit, ("changed: ", first.name)),
        (swap, ("the same shards in another order",)),
    ):
        change()
        said = refused(train(shards), *words, "run.accept_data=")
        then, now = (said.partition(word)[2][:64] for word in ("fingerprint was ", "it is "))
        assert then != now
        assert said.endswith(f"run.accept_data={now}")
        assert files(tmp_path / "run") == before
        restore()
    resumed(train(shards))


def test_other_data_that_the_user_accepts(train, shards, tmp_path):
    assert train(shards).returncode == 0
    shutil.copy(next(shards.glob("*.tar")), shards / "99999.tar")
    said = refused(train(shards))
    accept = said.rpartition(" ")[2]
    refused(train(shards, accept[:-1] + ("0" if accept[-1] != "0" else "1")), accept)
    done = train(shards, accept)
    resumed(done)
    assert "run.accept_data accepts them" in done.stderr
    record = json.loads((tmp_path / "run" / "checkpoints" / "00000004" / "COMPLETE").read_text(encoding="utf-8"))
    assert accept == f"run.accept_data={record['data']}"
    (tmp_path / "run" / "checkpoints" / "00000002" / "COMPLETE").write_text("{}", encoding="utf-8")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "00000004", tmp_path / "kept")
    (shards / "99999.tar").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000002")
    record |= {"step": 2}
    (tmp_path / "kept" / "COMPLETE").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "kept").rename(tmp_path / "run" / "checkpoints" / "00000002")
    refused(train(shards, accept), "missing: 99999.tar")  # it accepts these data, and no others


def test_a_checkpoint_without_a_fingerprint_resumes_with_a_word(train, shards, tmp_path):
    assert train(shards).returncode == 0
    path = tmp_path / "run" / "checkpoints" / "00000002" / "COMPLETE"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["data"], record["init"]
    path.write_text(json.dumps(record), encoding="utf-8")
    refused(train(f"{shards}/"), "differs in data.source")
    done = train(shards)
    resumed(done)
    assert "has no fingerprint of its data: they are not compared" in done.stderr


def test_encoders_and_latents_resume_wherever_they_are(stage, mmdit, tmp_path, history):
    folder = tmp_path / "inputs"
    for name in ("encoded", "codec", "encoders"):
        shutil.copytree(stage.folder / name, folder / name)
    config = stage.train_config("moved", run={"dir": str(tmp_path / "run")})

    def train(folder, *overrides):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004", ignore_errors=True)
        text = [f"objective.text.{name}={folder / 'encoders' / name}" for name in ("t5", "clip_l", "clip_g")]
        places = [f"data.path={folder / 'encoded'}", f"objective.autoencoder={folder / 'codec'}", *text]
        return mmdit("train", config, *places, *SHORT, *overrides)

    assert train(folder).returncode == 0
    before = history(tmp_path / "run")
    folder.rename(tmp_path / "moved")
    resumed(train(tmp_path / "moved"))
    assert history(tmp_path / "run") == before
    refused(train(tmp_path / "moved", "objective.text.batch_size=3"), "differs in objective.text")
    single = "{" + str(tmp_path / "moved" / "encoded") + ": 1.0}"
    resumed(train(tmp_path / "moved", f"data.path={single}"))


def test_the_weights_that_a_run_began_with(stage, mmdit, tmp_path):
    weights = tmp_path / "first.safetensors"
    source = stage.train_config("source", run={"dir": str(tmp_path / "source")})
    assert mmdit("train", source, *SHORT).returncode == 0
    shutil.copy(tmp_path / "source" / "snapshots" / "00000004.safetensors", weights)
    config = stage.train_config("after", run={"dir": str(tmp_path / "run")})

    def train(init):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004", ignore_errors=True)
        return mmdit("train", config, *SHORT, *([f"init.from={init}"] if init else []))

    assert train(weights).returncode == 0
    weights.rename(tmp_path / "moved.safetensors")
    resumed(train(tmp_path / "moved.safetensors"))
    resumed(train(weights))  # it is gone, and is not read
    data = bytearray((tmp_path / "moved.safetensors").read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(train(weights), "init.from", "is not what the run began with: the fingerprint of its weights was")
    refused(train(None), "init.from=None is not what the run began with")


def test_a_mixture_is_its_contents_weights_and_order(stage, tmp_path):
    for name in "abc":
        shutil.copytree(stage.shards, tmp_path / name)
    (tmp_path / "b" / "00001.tar").unlink()

    def fingerprint(source, **more) -> str:
        mixture = {str(tmp_path / name): weight for name, weight in source.items()}
        return ImageDataset(ImageData(source=mixture, batch_size=8, **more), 0).identity.fingerprint

    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"c": 1, "b": 2}) == fingerprint({"c": 1, "b": 2}, window=9)
    paired = str(tmp_path / "c")
    different = [{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"b": 2, "a": 1}, {"a": 1, "c": 2}, {"a": 1}, {"b": 1}]
    assert len({*map(fingerprint, different), fingerprint({"a": 1}, paired=paired)}) == len(different) + 1


def test_a_list_of_shards_that_cannot_be_read_is_no_reason_to_refuse(tmp_path):
    assert identity.read(tmp_path) is None
    for damaged in (b"", b"{", b"[]", b'{"parts": 3}', b"\xff\xfe"):
        (tmp_path / "data.json").write_bytes(damaged)
        assert identity.read(tmp_path) is None
    known = DataIdentity(parts=[Part(role="train", weight=None, names=["a.tar"], contents=["0" * 64])], facts={})
    identity.write(tmp_path, known)
    assert identity.read(tmp_path) == known


def test_what_is_measured_of_a_shard_is_part_of_it(stage, monkeypatch, tmp_path):
    """Another rule for sizes changes the plan, though the bytes are the same."""
    path = sorted(stage.shards.glob("*.tar"))[0]
    before = ShardSet(index_shards(path)).part("train", None).contents
    monkeypatch.setattr("stack.data.index.image_size", lambda file: (8, 8))
    after = ShardSet(index_shards(path, tmp_path)).part("train", None).contents
    assert before != after
