from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from stack import config
from stack.config import Config, UserError


class Round(Config):
    kind: Literal["round"] = "round"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Optim(Config):
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)


class Whole(Config):
    name: str
    steps: int = 10
    optim: Optim = Optim()
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_precedence_base_file_overrides(tmp_path):
    write(tmp_path, "base/optim.yaml", "optim: {lr: 1e-3, betas: [0.5, 0.6]}\nsteps: 5\n")
    path = write(tmp_path, "run.yaml", "base: base/optim.yaml\nname: x\nsteps: 7\n")
    loaded = config.load(Whole, path, ["optim.lr=3e-4", "shape.kind=square", "shape.side=2"])
    assert loaded.steps == 7
    assert loaded.optim == Optim(lr=3e-4, betas=(0.5, 0.6))
    assert loaded.shape == Square(side=2)


def test_dump_loads_again_and_has_the_same_fingerprint(tmp_path):
    loaded = config.load(Whole, overrides=["name=x", "optim.lr=1e-5"])
    again = config.load(Whole, write(tmp_path, "dump.yaml", config.dump(loaded)))
    assert again == loaded
    assert config.fingerprint(again) == config.fingerprint(loaded)
    assert config.fingerprint(again) != config.fingerprint(config.load(Whole, overrides=["name=y"]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["name=x", "stpes=3"], "unknown key 'stpes', did you mean 'steps'?"),
        (["name=x", "optim.lrr=3"], "unknown key 'optim.lrr', did you mean 'lr'?"),
        (["name=x", "shape.kind=square", "shape.sidee=3"], "unknown key 'shape.sidee', did you mean 'side'?"),
        (["name=x", "optim.zzzz=3"], "known keys: betas, lr"),
        ([], "key 'name' is missing"),
        (["name=x", "steps=many"], "steps: Input should be a valid integer"),
        (["name=x", "shape.kind=oval"], "shape: Input tag 'oval'"),
        (["name"], "override 'name' is not of the form key.subkey=value"),
    ],
)
def test_mistakes_are_named(overrides, says):
    with pytest.raises(UserError) as caught:
        config.load(Whole, overrides=overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_circle_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such configuration file"):
        config.load(Whole, tmp_path / "nowhere.yaml")
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        config.load(Whole, tmp_path / "a.yaml")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        config.load(Whole, write(tmp_path, "broken.yaml", "a: [1\n"))


def test_nothing_in_a_file_is_resolved_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_CANARY", "canary-value")
    loaded = config.load(Whole, write(tmp_path, "x.yaml", "name: ${oc.env:SECRET_CANARY}\n"))
    assert loaded.name == "${oc.env:SECRET_CANARY}"
