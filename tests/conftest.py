"""A small data set taken through every stage before training, once a test session, by the commands that users type."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import, or it compiles for a GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {"gpu": None if torch.cuda.is_available() else "needs a CUDA device"}
    if any(item.get_closest_marker("slurm") for item in items):
        missing["slurm"] = no_local_slurm()
    for marker, reason in missing.items():
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def no_local_slurm() -> str | None:
    """Why the tests on Slurm do not run. Nobody's real cluster gets jobs from tests."""
    reason = "needs the local Slurm: slurm/local/up.sh, then source the env.sh that it names"
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
        nodes = subprocess.run(["sinfo", "-h", "-N"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return reason
    local = re.search(r"^ClusterName\s*= mmdit-local$", shown.stdout, flags=re.MULTILINE)
    return None if local and nodes.returncode == 0 else reason


def run_mmdit(*arguments: object) -> Done:
    """The command line inside this process, which has paid for its imports."""
    from launch.cli import run
    from stack import dist

    out, error = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(error):
            code = run([str(argument) for argument in arguments])
    finally:
        dist.shutdown()  # a training that failed leaves it to the end of its process, and commands inherit variables
    return Done(code, out.getvalue(), error.getvalue())


def succeed(*arguments: object) -> Done:
    done = run_mmdit(*arguments)
    assert done.returncode == 0, done.stderr
    return done


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def mmdit() -> Callable[..., Done]:
    return run_mmdit


@dataclass
class Stage:
    """Folders of the small data set."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name

    def train_config(self, name: str, **sections: dict) -> Path:
        """A training configuration over the pre-encoded samples; `sections` win over the defaults key by key."""
        values: dict = {
            "run": {"dir": str(self.folder / name)},
            "data": {"kind": "latents", "path": str(self.encoded), "batch_size": 8, "max_validation": 8},
            "objective": {
                "kind": "text_to_image",
                "model": {"preset": "mmdit-test", "context_dim": 128, "pooled_dim": 128},
                "autoencoder": str(self.codec),
                "text": {key: str(self.encoders / key) for key in ("t5", "clip_l", "clip_g")},
                "preview": {"prompts": ["a red circle"], "steps": 2},
            },
            "optim": {"lr": 1e-3},
            "schedule": {"steps": 4, "warmup": 2},
            "log": {"every": 1, "wandb": "disabled"},
        }
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


class Training:
    """`mmdit train` in processes of its own, which die together."""

    def __init__(self, config: Path, ranks: int, environment: Mapping[str, str] | None = None, **popen: Any):
        from stack.dist import VARIABLES

        # Nor wandb's service of this process, which a training in it has started.
        inherited = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "WANDB_SERVICE")}
        self.run = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["run"]["dir"])
        self._metrics = self.run / "metrics.jsonl"
        self._stale = self._metrics.stat().st_mtime_ns if self._metrics.exists() else None  # of the process before
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", str(config), "--ranks", str(ranks)],
            cwd=ROOT,
            env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            **popen,
        )

    def finish(self, code: int = 0) -> str:
        """What it said on standard error."""
        error = self.process.communicate(timeout=300)[1]
        assert self.process.returncode == code, error
        return error

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            fresh = self._metrics.exists() and self._metrics.stat().st_mtime_ns != self._stale
            if fresh and any(line["step"] >= step for line in read_lines(self._metrics)):
                return
            time.sleep(0.002)
        raise AssertionError(f"step {step} was not reached: {self.process.communicate()[1]}")

    def ranks(self) -> list[psutil.Process]:
        """Its ranks' processes, in order."""
        places = [(c.environ().get("RANK"), c) for c in psutil.Process(self.process.pid).children()]
        return [child for _, child in sorted((int(rank), c) for rank, c in places if rank is not None)]

    def kill(self) -> str:
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.communicate()[1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A run's whole lines of JSON."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def training() -> type[Training]:
    return Training


@pytest.fixture(scope="session")
def history() -> Callable[[Path], list[tuple]]:
    """What a run's metrics say of what it learnt."""
    names = ("step", "loss", "grad_norm", "lr", "val_loss", "loss_t0", "loss_t3")
    return lambda run: [tuple(line.get(name) for name in names) for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Drawn scenes, a codec after four steps of training, untrained encoders and the pre-encoded samples."""
    from stack.text.encoders import write_untrained_encoders

    stage = Stage(tmp_path_factory.mktemp("stage"))
    succeed("data", "synth", stage.shards, "num_samples=96", "samples_per_shard=40")
    config = stage.folder / "autoencoder.yaml"
    values = {
        "run": {"dir": str(stage.autoencoder)},
        "data": {"kind": "images", "source": str(stage.shards), "batch_size": 8, "max_validation": 8},
        "objective": {"kind": "autoencoder", "channels": 4, "block_out_channels": [8, 8, 8], "norm_groups": 4},
        "schedule": {"steps": 4, "warmup": 1},
        "log": {"every": 1, "wandb": "disabled"},
    }
    config.write_text(yaml.safe_dump(values))
    succeed("train", config)
    succeed("export", stage.autoencoder, "-o", stage.codec, "--samples", 16)
    write_untrained_encoders(stage.encoders, seed=0)
    encoders = {key: str(stage.encoders / key) for key in ("t5", "clip_l", "clip_g")}
    config = stage.folder / "preencode.yaml"
    config.write_text(
        yaml.safe_dump(
            {"source": str(stage.shards), "out": str(stage.encoded), "autoencoder": str(stage.codec), "text": encoders}
        )
    )
    succeed("preencode", config)
    return stage
