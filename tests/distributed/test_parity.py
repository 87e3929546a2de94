"""One training on every engine, ZeRO stage and number of ranks: the same losses, skipped steps and resumed state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stack.data.shards import ShardSet, index_shards
from stack.dist import VARIABLES, free_port

ENGINES = {"local": {"engine": "local"}, **{f"zero{s}": {"engine": "zero", "zero_stage": s} for s in range(4)}}


def run_ranks(configs: list[Path], ranks: int) -> None:
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        group = dict(zip(VARIABLES, (str(rank), str(ranks), str(rank), "127.0.0.1", port), strict=True))
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), *map(str, configs)]
        processes.append(
            subprocess.Popen(command, env={**os.environ, **group, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        )
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> np.ndarray:
    return np.array([line["loss"] for line in metrics(run) if "loss" in line])


@pytest.fixture(scope="module")
def runs(stage) -> dict[tuple[str, int], Path]:
    """20 steps of the same training, two micro-batches a step, by (engine, ranks)."""
    found = {}
    for ranks in (1, 2):
        names = [name for name in ENGINES if not (name == "local" and ranks == 2)]
        configs = []
        for name in names:
            parallel = {**ENGINES[name], "accumulate": 2}
            schedule = {"steps": 20, "warmup": 5, "kind": "cosine"}
            configs.append(stage.train_config(f"parity-{name}-{ranks}", parallel=parallel, schedule=schedule))
            found[name, ranks] = stage.folder / f"parity-{name}-{ranks}"
        run_ranks(configs, ranks)
    return found


def test_engines_agree_on_one_rank(runs):
    expected = losses(runs["local", 1])
    assert len(expected) == 20
    assert expected[-1] != expected[0]
    for stage in range(4):
        np.testing.assert_allclose(losses(runs[f"zero{stage}", 1]), expected, rtol=1e-5)


def test_stages_agree_on_two_ranks(runs):
    for stage in (1, 2, 3):
        np.testing.assert_allclose(losses(runs[f"zero{stage}", 2]), losses(runs["zero0", 2]), rtol=1e-5)


def test_one_and_two_ranks_agree(runs):
    for stage in range(4):
        np.testing.assert_allclose(losses(runs[f"zero{stage}", 2]), losses(runs["local", 1]), rtol=1e-4)


def test_averaged_weights_agree(runs):
    from safetensors.numpy import load_file

    expected = load_file(runs["local", 1] / "snapshots" / "00000020.safetensors")
    for name, ranks in runs:
        found = load_file(runs[name, ranks] / "snapshots" / "00000020.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=2e-4, err_msg=f"{name} on {ranks} ranks: {key}")


def test_validation_loss_is_the_same_on_any_number_of_ranks(runs):
    values = [metrics(run)[-1]["val_loss"] for run in runs.values()]
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


@pytest.mark.parametrize(("first", "second"), [(("zero2", 2), ("local", 1)), (("zero1", 2), ("zero3", 2))])
def test_another_engine_goes_on_from_a_checkpoint(runs, stage, first, second):
    """Half the training on one engine and number of ranks, the rest on another, without a step by hand."""
    name = f"elastic-{first[0]}-{second[0]}"
    schedule = {"steps": 20, "warmup": 5, "kind": "cosine"}
    keys = {"schedule": schedule, "checkpoint": {"every": 10}}
    config = stage.train_config(name, parallel={**ENGINES[first[0]], "accumulate": 2}, **keys)
    run_ranks([config], first[1])
    shutil.rmtree(stage.folder / name / "checkpoints" / "00000020")
    config = stage.train_config(name, parallel={**ENGINES[second[0]], "accumulate": 2}, **keys)
    run_ranks([config], second[1])
    np.testing.assert_allclose(losses(stage.folder / name), losses(runs["local", 1]), rtol=1e-4)


def test_one_run_on_changing_ranks_and_stages(runs, stage):
    """A third each on two ranks with ZeRO-1, one rank with ZeRO-3, two with ZeRO-2: the undisturbed run's losses."""
    name, thirds = "elastic", (("zero1", 2), ("zero3", 1), ("zero2", 2))
    keys = {
        "schedule": {"steps": 30, "warmup": 5, "kind": "cosine"},
        "checkpoint": {"every": 10, "keep": 3},
        "log": {"every": 1, "wandb": "disabled", "keys": True},
    }
    run_ranks([stage.train_config(f"{name}-whole", parallel=ENGINES["zero1"], **keys)], 2)
    for number, (engine, ranks) in enumerate(thirds, 1):
        run_ranks([stage.train_config(name, parallel=ENGINES[engine], **keys)], ranks)
        for path in (stage.folder / name / "checkpoints").glob("0*"):
            if int(path.name) > 10 * number:
                shutil.rmtree(path)
    run, whole = stage.folder / name, stage.folder / f"{name}-whole"
    assert len(losses(run)) == 30
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-4)
    assert (run / "keys.jsonl").read_text() == (whole / "keys.jsonl").read_text()


def test_a_nan_on_one_rank_skips_the_step_on_all(stage):
    """One sample's latent is NaN: the step that has it changes nothing at any stage, and is counted."""
    broken = stage.folder / "encoded-nan"
    shutil.copytree(stage.encoded, broken)
    index = ShardSet(index_shards(broken)).indices[0]
    with open(index.url, "r+b") as file:
        offset, length = index.span(3, "safetensors")
        file.seek(offset)
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(offset)
        data = file.read(length)
        start, stop = json.loads(data[8:header])["latent_mean"]["data_offsets"]
        file.seek(offset + header + start)
        file.write(b"\xc0\x7f" * ((stop - start) // 2))
    (index, *_) = index_shards(broken, rebuild=True)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["shards"][index.name]["sha256"] = index.sha256
    (broken / "manifest.json").write_text(json.dumps(manifest))
    configs = []
    for name in ("zero0", "zero1", "zero2", "zero3"):
        keys = {"data": {"path": str(broken), "validation_share": 0.0}, "schedule": {"steps": 12, "warmup": 2}}
        configs.append(stage.train_config(f"nan-{name}", parallel=ENGINES[name], **keys))
    run_ranks(configs, 2)
    for name in ("zero0", "zero1", "zero2", "zero3"):
        lines = [line for line in metrics(stage.folder / f"nan-{name}") if "loss" in line]
        assert lines[-1]["skipped"] == 1, name
        assert len([line for line in lines if line["loss"] is None]) == 1
        assert lines[-1]["loss"] is not None
