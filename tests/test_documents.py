"""README, configurations and their header comments say what is true."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from launch.cli import group
from launch.sweep import SweepConfig
from stack import config
from stack.preencode.job import PreencodeConfig
from stack.train.recipe import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMAS = {"train": TrainConfig, "autoencoder": TrainConfig, "preencode": PreencodeConfig, "sweep": SweepConfig}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_configuration_loads_and_its_header_names_itself(path):
    config.load(SCHEMAS[path.parent.name], path)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert str(path.relative_to(ROOT)) in header
    assert "Hardware:" in header


def commands(text: str) -> list[list[str]]:
    return [line.split("#")[0].split()[1:] for line in re.findall(r"^(?:# )?(mmdit .*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_a_command_of_the_readme_exists_and_takes_its_options(words):
    command: click.Command | None = group
    while isinstance(command, click.Group) and words:
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_paths_of_the_readme_exist():
    named = set(re.findall(r"(?<![-\w])(?:configs|stack|docs|launch|slurm)/[\w/.]+\.\w+", README))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    tree = README[README.index("## The tree") : README.index("## A guided tour")]
    for name in re.findall(r"^(\S+/) ", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()
    assert "RESULTS" not in README


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
