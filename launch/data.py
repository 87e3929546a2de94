"""`mmdit data`: make and index shards, write encoders for trying things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _folders(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that read shards."""
    for name, parameter, text in (
        ("--index", "folder", "Folder for the shards' indices; beside the shards if not given."),
        ("--cache", "cache", "Folder for copies of remote shards; in the system's temporary folder if not given."),
    ):
        command = click.option(name, parameter, type=click.Path(path_type=Path), help=text)(command)
    return command


@click.group("data")
def command() -> None:
    """Make and index shards."""


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
def synth(out: Path, overrides: tuple[str, ...]) -> None:
    """Write shards of drawn scenes with captions into OUT.

    OVERRIDES are keys of the scenes' settings: num_samples=12000 resolution=32 seed=0. The held-out combinations of
    colour, shape and position never appear.
    """
    from stack import config as configuration
    from stack.data.synthetic import HELD_OUT, SynthConfig, write_shards
    from stack.log import progress

    config = configuration.load(SynthConfig, overrides=overrides)
    with progress("synth", config.num_samples, "sample") as advance:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        write_shards(out, config, report)
    combinations = ", ".join(f"{colour} {kind} {position}" for colour, kind, position in HELD_OUT)
    click.echo(f"{out}: {config.num_samples:,} scenes; held out: {combinations}")


@command.command()
@click.argument("shards")
@_folders
def index(shards: str, folder: Path | None, cache: Path | None) -> None:
    """Index SHARDS (a folder, a .tar, a glob or a URL) and say what is in them.

    Shards that changed since they were indexed are indexed again.
    """
    from stack.data.remote import CacheConfig, ShardCache
    from stack.data.shards import find_shards, index_shards
    from stack.log import progress
    from stack.shown import printable, redact

    with progress("index", len(find_shards(shards)), "shard") as advance:
        indices = index_shards(shards, folder, ShardCache(CacheConfig(dir=cache)), True, lambda done, total: advance(1))
    for found in indices:
        problems = "".join(f"\n  {printable(f'{r.key}: {r.reason}')}" for r in found.rejected)
        damage = f"\n  {found.damage}" if found.damage else ""
        click.echo(
            f"{printable(redact(found.url))}: {len(found):,} samples, {len(found.rejected)} left out{damage}{problems}"
        )
    click.echo(f"{sum(map(len, indices)):,} samples in {len(indices)} shards")


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def encoders(out: Path, seed: int) -> None:
    """Write small untrained text encoders (t5, clip_l, clip_g) into OUT, for trying things without a download."""
    from stack.text.encoders import write_untrained_encoders

    write_untrained_encoders(out, seed)
    click.echo(f"{out}: t5, clip_l, clip_g with random weights of seed {seed}")
