"""What another training has left in a run's folder is not taken for this one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from stack import config as configuration
from stack.evaluate.results import mark_of
from stack.evaluate.run import EvaluationConfig, Evaluator
from stack.log import read_metrics
from stack.train import identity, origin, recipe, snapshot
from stack.train.recipe import TrainConfig

SECTIONS: dict = {
    "snapshot": {"every": 1},
    "checkpoint": {"every": 2, "keep": 9},
    "schedule": {"steps": 4, "warmup": 1},
}


@pytest.fixture(scope="module")
def evaluated(stage, mmdit) -> Path:
    """A run of four steps, each with a snapshot and its evaluation."""
    config = stage.train_config("original", **SECTIONS)
    assert mmdit("train", config).returncode == 0
    assert mmdit("evaluate", stage.folder / "original", "--watch").returncode == 0
    return stage.folder / "original"


@pytest.fixture
def run(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


@pytest.fixture
def train(stage, mmdit, run):
    """`mmdit train` in the folder `run`, with overrides."""
    path = stage.folder / "original.yaml"
    return lambda *overrides: mmdit("train", path, f"run.dir={run}", *overrides)


def lose_checkpoints(run: Path) -> None:
    """As of a run that was killed before its first one."""
    shutil.rmtree(run / "checkpoints")


def lose_last_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "00000004")


def results(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["val_loss"] for line in lines}


def validation(run: Path) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in read_metrics(run) if "val_loss" in line}


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    files = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


EVALUATED = ("snapshots/*.safetensors", "samples/*", "eval/*/*", "eval.jsonl")


def test_another_training_in_the_folder_begins_anew(run, train, mmdit):
    before = contents(run, *EVALUATED, "metrics.jsonl", "config.yaml")
    lose_checkpoints(run)
    done = train("optim.lr=0.02", "schedule.steps=2")
    assert done.returncode == 0, done.stderr
    assert f"what another training left here of steps after 0 was moved to {run / 'earlier' / '1'}" in done.stderr
    assert snapshot.steps(run) == [1, 2]
    assert not list((run / "eval").glob("*"))
    assert contents(run / "earlier" / "1", *EVALUATED, "metrics.jsonl", "config.yaml") == before
    assert mmdit("evaluate", run, "--watch").returncode == 0
    assert results(run) == pytest.approx(validation(run), rel=1e-5)
    assert list(results(run)) == [1, 2]
    assert json.loads((run / "eval.jsonl").read_text().splitlines()[0])["origin"] == origin.of(run)
    assert mmdit("evaluate", run / "earlier" / "1", "--watch").returncode == 0  # it is a run as before
    assert contents(run / "earlier" / "1", *EVALUATED, "metrics.jsonl", "config.yaml") == before


def test_the_same_training_keeps_what_it_has(run, train, mmdit):
    before = contents(run, *EVALUATED)
    lose_checkpoints(run)
    assert train("data.workers=1", "log.every=2").returncode == 0
    assert not (run / "earlier").exists()
    assert contents(run, *EVALUATED) == before
    done = mmdit("evaluate", run, "--watch")
    assert (done.returncode, "eval/val_loss" in done.stderr) == (0, False)


def test_other_data_under_the_same_path_are_another_training(stage, run, train, mmdit, tmp_path):
    shutil.copytree(stage.encoded, tmp_path / "encoded")
    lose_checkpoints(run)
    assert train(f"data.path={tmp_path / 'encoded'}").returncode == 0
    assert not (run / "earlier").exists()  # equal data in another place
    last = sorted((tmp_path / "encoded").glob("*.tar"))[-1]
    last.unlink()
    manifest = json.loads((tmp_path / "encoded" / "manifest.json").read_text())
    del manifest["shards"][last.name]
    (tmp_path / "encoded" / "manifest.json").write_text(json.dumps(manifest))
    lose_checkpoints(run)
    done = train(f"data.path={tmp_path / 'encoded'}")
    assert done.returncode == 0, done.stderr
    assert snapshot.steps(run / "earlier" / "1") == [1, 2, 3, 4]


def test_a_resumed_run_keeps_its_past_and_the_future_of_the_same_training(run, train):
    before = contents(run, *EVALUATED)
    lose_last_checkpoint(run)
    done = train()
    assert "going on after step 2" in done.stderr
    assert contents(run, *EVALUATED) == before
    lose_last_checkpoint(run)
    done = train("objective.preview.steps=3")
    assert "steps after 2 was moved" in done.stderr
    assert snapshot.steps(run / "earlier" / "1") == [3, 4]
    assert list(results(run)) == [1, 2]
    assert sorted(path.name for path in (run / "eval").glob("*")) == ["00000001", "00000002"]
    assert snapshot.steps(run) == [1, 2, 3, 4]
    assert results(run / "earlier" / "1").keys() == {1, 2, 3, 4}


def test_a_run_of_an_older_version_is_evaluated_and_goes_on(run, train, mmdit):
    (run / "origin.json").unlink()
    shutil.rmtree(run / "eval")
    (run / "eval.jsonl").unlink()
    for step in snapshot.steps(run):
        snap = snapshot.read(run, step)
        snap.metadata.pop("origin")
        snapshot.write(run, step, snap.weights, snap.metadata)
    assert mmdit("evaluate", run, "--watch").returncode == 0
    settings = json.loads((run / "eval.jsonl").read_text().splitlines()[0])["settings"]
    assert (run / "eval" / "00000001" / f"{mark_of(settings, None)}.json").exists()
    lose_last_checkpoint(run)
    assert train().returncode == 0
    assert list(results(run)) == [1, 2]  # who wrote the later ones is not known
    assert mmdit("evaluate", run, "--watch").returncode == 0
    assert results(run) == pytest.approx(validation(run), rel=1e-5)


def test_a_result_in_hand_follows_its_snapshot(run, evaluated):
    shutil.rmtree(run / "eval")
    evaluator = Evaluator(run, EvaluationConfig())
    result = evaluator.measure(3)
    with origin.beginning(run, 0, "another"):
        pass
    evaluator.report(result)
    assert evaluator.outdated()
    assert not list(run.glob("eval/*/*"))
    assert not (run / "eval.jsonl").read_text()
    assert len(list(run.glob("earlier/1/eval/00000003/*.json"))) == 1


def test_an_evaluator_takes_up_the_new_training(run, train, mmdit, monkeypatch):
    """It has built data and network for the configuration of the one before."""
    from stack.evaluate import watch as service

    shutil.rmtree(run / "eval")
    lose_checkpoints(run)
    measure = Evaluator.measure
    trained = []

    def measured(self: Evaluator, step: int) -> dict:
        if not trained:
            trained.append(train("optim.lr=0.02", "data.max_validation=4", "schedule.steps=3"))
        return measure(self, step)

    monkeypatch.setattr(Evaluator, "measure", measured)
    monkeypatch.setattr(service, "POLL_S", 0.01)
    done = mmdit("evaluate", run, "--watch")
    assert (trained[0].returncode, done.returncode) == (0, 0), done.stderr
    assert "another training has begun here" in done.stderr
    assert results(run) == pytest.approx(validation(run), rel=1e-5)
    assert list(results(run)) == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"origin": ', b'{"origin": "another"}'])
def test_an_origin_that_cannot_be_read_is_another(run, content):
    (run / "origin.json").write_bytes(content)
    before = contents(run, *EVALUATED, "metrics.jsonl", "config.yaml")
    with origin.beginning(run, 0, "this"):
        assert (run / "config.yaml").exists()  # for evaluators
        assert origin.of(run) is None
    assert contents(run / "earlier" / "1", *EVALUATED, "metrics.jsonl", "config.yaml") == before
    assert origin.of(run) == "this"
    with origin.beginning(run, 0, "this"):
        pass
    assert not (run / "earlier" / "2").exists()


def test_the_origin_is_of_what_the_weights_depend_on(stage):
    def of(*overrides: str) -> str:
        config = configuration.load(TrainConfig, stage.train_config("origins"), overrides)
        data, objective = recipe.build(config, torch.device("cpu"))
        inputs = {"data": data.identity.fingerprint, "encoders": objective.metadata()["encoders"]}
        return identity.origin_of(config, inputs)

    first = of()
    free = ("run.dir=elsewhere", "log.every=3", "snapshot.every=7", "data.workers=2", f"data.path={stage.encoded}/.")
    free += (f"objective.autoencoder={stage.codec}/.", f"objective.text.t5={stage.encoders}/./t5")
    assert {of(override) for override in free} == {first}
    changes = ("optim.lr=0.02", "run.seed=5", "schedule.steps=9", "data.batch_size=4", "objective.preview.steps=3")
    assert len({first, *map(of, changes)}) == 1 + len(changes)
