from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from stack import config
from stack.config import Config, Location, Seed, UserError


class Round(Config):
    kind: Literal["round"] = "round"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Optim(Config):
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)


class Typed(Config):
    folder: Path = Path("here")
    index: Path | None = None
    source: Location | dict[Location, float] = "x"
    prompts: tuple[str, ...] = ()
    captions: dict[str, str] = Field(default={})
    mode: Literal["off", "online"] = "online"
    scale: float | Literal["auto"] = "auto"
    seed: Seed = 0
    flag: bool = False


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


TEXTS = ["20241105", "1e3", "0x10", "007", "true", "null", "1_000", "2024-11-05", "on", ".5", "1:30", "="]
NO_YAML = ["a #1", "a: b", "a: b: c", "[x", "*", "&a", "{a,b}.tar", "!x", "%x", "@x"]


@pytest.mark.parametrize("text", [*TEXTS, *NO_YAML])
def test_a_path_or_a_text_keeps_what_was_typed(tmp_path, text):
    assert config.load(Typed, overrides=[f"folder={text}"]).folder == Path(text)
    assert config.load(Whole, overrides=[f"name={text}"]).name == text
    if text in TEXTS:
        loaded = config.load(Typed, write(tmp_path, "x.yaml", f"folder: {text}\nprompts: [{text}, {text}]\n"))
        assert (loaded.folder, loaded.prompts) == (Path(text), (text, text))
        assert config.load(Typed, write(tmp_path, "again.yaml", config.dump(loaded))) == loaded


def test_other_values_are_read_as_before():
    loaded = config.load(Typed, overrides=["index=null", "scale=1e-4", "flag=on", "mode=off", "captions={1: yes}"])
    assert (loaded.index, loaded.scale, loaded.flag, loaded.mode) == (None, 1e-4, True, "off")
    assert loaded.captions == {"1": "yes"}
    loaded = config.load(Whole, overrides=["name='x y'", "steps=1_000", "optim={lr: .5}", "optim.betas=[0, 1e-1]"])
    assert (loaded.name, loaded.steps, loaded.optim) == ("x y", 1000, Optim(lr=0.5, betas=(0, 0.1)))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    loaded = config.load(Typed, overrides=["folder=~/a", "index=~", "source=~/{a,b}.tar"])
    assert (loaded.folder, loaded.index, loaded.source) == (Path("/home/x/a"), None, "/home/x/{a,b}.tar")
    assert config.load(Typed, overrides=["source={~/a,~/b}"]).source == "{/home/x/a,/home/x/b}"
    assert config.load(Typed, overrides=["source={~/a: 1, b: 2}"]).source == {"/home/x/a": 1, "b": 2}
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "base.yaml", "folder: x~\n")
    assert config.load(Typed, write(tmp_path, "run.yaml", "base: ~/base.yaml\n")).folder == Path("x~")


@pytest.mark.parametrize("text", ["$HOME/x", "${HOME}/x", "a/$(id)", "a/`id`", "${oc.env:HOME}"])
def test_what_a_shell_expands_is_refused_in_a_path(tmp_path, text):
    for key in ("folder", "index", "source"):
        with pytest.raises(UserError, match="is not expanded in a path"):
            config.load(Typed, overrides=[f"{key}={text}"])
    with pytest.raises(UserError, match="is not expanded in a path"):
        config.load(Typed, write(tmp_path, "x.yaml", yaml.safe_dump({"source": {text: 1.0}})))
    with pytest.raises(UserError, match="is not expanded in a path"):
        config.load(Typed, write(tmp_path, "x.yaml", yaml.safe_dump({"base": text})))
    assert config.load(Typed, overrides=["source=s3://bucket/$x.tar"]).source == "s3://bucket/$x.tar"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("=", "not of the form"),
        ("optim..lr=1", "not of the form"),
        ("optim[0]=1", "unknown key 'optim[0]', did you mean 'optim'?"),
        ("optim.lr=", "optim.lr: Input should be a valid number"),
        ("optim=5", "optim: Input should be a valid dictionary"),
        ("optim=", "optim: Input should be a valid dictionary"),
        ("optim.betas=[1, 2", "flow sequence"),
        ("optim.lr=.inf", "finite number"),
        ("optim.lr=nan", "finite number"),
        ("optim.lr=1e400", "finite number"),
        ("optim.betas=[0, .inf]", "finite number"),
        (f"steps={10**30}", "at most 64 bits"),
        (f"steps={'9' * 5000}", "4300 digits"),
    ],
)
def test_odd_overrides_are_named(override, says):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        config.load(Whole, overrides=["name=x", override])
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed):
    assert config.load(Typed, overrides=[f"seed={2**64 - 1}"]).seed == 2**64 - 1
    with pytest.raises(UserError, match=r"seed: Input should be (less than 18446744073709551616|greater than)"):
        config.load(Typed, overrides=[f"seed={seed}"])


def test_a_file_that_cannot_be_read_now_is_no_mistake(tmp_path, monkeypatch):
    path = write(tmp_path, "x.yaml", "name: x\n")

    def stale(self: Path, *arguments: object) -> object:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        config.load(Whole, path)
