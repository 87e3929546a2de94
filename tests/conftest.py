"""A small data set taken through every stage before training, once a test session, by the commands that users type."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import, or it compiles for a GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
                "kind": "rectified_flow",
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
