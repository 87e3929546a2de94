"""`mmdit data`: make, index, check and show shards, write encoders for trying things."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.arguments import LOCATION, PATH, SEED

if TYPE_CHECKING:
    from stack.data.buckets import BucketRule


def _folders(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that read shards."""
    for name, parameter, text in (
        ("--index", "folder", "Folder for the shards' indices; beside the shards if not given."),
        ("--cache", "cache", "Folder for copies of remote shards; in the system's temporary folder if not given."),
    ):
        command = click.option(name, parameter, type=PATH, help=text)(command)
    return command


def _buckets(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that are the keys of `buckets` in a configuration."""
    for name, kind, text in (
        ("--max-ratio", float, "Longer side : shorter side of the generated buckets."),
        ("--step", int, "Of which all sides of the generated buckets are multiples."),
        ("--table", str, "A published list of buckets: sdxl or pixart."),
        ("--resolution", int, "Side of the square bucket in pixels."),
    ):
        command = click.option(name, type=kind, help=text)(command)
    return command


def _rule(options: dict[str, Any]) -> BucketRule | None:
    """The buckets that the options of `_buckets` name. Raises UserError."""
    from stack.config import UserError, validate
    from stack.data.buckets import BucketConfig

    given = {name: value for name, value in options.items() if value is not None}
    if given and "resolution" not in given:
        raise UserError("--table, --step and --max-ratio need --resolution")
    return validate(BucketConfig, given, "options").rule() if given else None


@click.group("data")
def command() -> None:
    """Make, index, check and show shards."""


@command.command()
@click.argument("out", type=PATH)
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
@click.argument("out", type=PATH)
def digits(out: Path) -> None:
    """Write shards of scikit-learn's handwritten digits (8×8 pixels, grey, with labels) into OUT."""
    from stack.data.digits import write_shards

    click.echo(f"{out}: {write_shards(out):,} digits")


@command.command()
@click.argument("shards", type=LOCATION)
@_folders
def index(shards: str, folder: Path | None, cache: Path | None) -> None:
    """Index SHARDS (a folder, a .tar, a glob or a URL) and say what is in them.

    Shards that changed since they were indexed are indexed again.
    """
    from stack.data.remote import CacheConfig, ShardCache
    from stack.data.shards import index_shards
    from stack.data.sources import find_shards
    from stack.log import progress
    from stack.shown import printable, redact

    with progress("index", len(find_shards(shards)), "shard") as advance:
        indices = index_shards(shards, folder, ShardCache(CacheConfig(dir=cache)), True, lambda done, total: advance(1))
    for found in indices:
        lines = [found.damage] if found.damage else []
        lines += found.passed_over
        lines += [f"{key}: {reason}" for key, reason in found.rejected]
        lines += [f"{found.key(row)}: {reason} (its image is used)" for row, reason in found.bad_captions.items()]
        details = "".join(f"\n  {printable(line)}" for line in lines)
        click.echo(f"{printable(redact(found.url))}: {len(found):,} samples, {len(found.rejected)} left out{details}")
    click.echo(f"{sum(map(len, indices)):,} samples in {len(indices)} shards")


@command.command()
@click.argument("shards", type=LOCATION)
@_buckets
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as one JSON object.")
@_folders
def info(shards: str, as_json: bool, folder: Path | None, cache: Path | None, **buckets: Any) -> None:
    """Say what stands in SHARDS (a folder, a .tar, a glob or a URL; raw or pre-encoded): counts, bytes, image sizes,
    caption lengths.

    Only indices are read; those that are missing are built. With --resolution raw images are counted by the buckets
    that they would be cropped to, named as in a configuration.
    """
    import json

    from stack.data.info import describe, render
    from stack.data.remote import CacheConfig, ShardCache

    facts = describe(shards, folder, ShardCache(CacheConfig(dir=cache)), _rule(buckets))
    click.echo(json.dumps(facts) if as_json else render(facts))


@command.command()
@click.argument("shards", type=LOCATION)
@_folders
def lint(shards: str, folder: Path | None, cache: Path | None) -> None:
    """Read every member of SHARDS (a folder, a .tar, a glob or a URL) and print what is wrong with them, a line each:
    shard: key: kind: detail.

    Images and captions are decoded; the tensors of pre-encoded samples are held against their manifest. No
    index is written. Lines with `not read` are notes: files of no sample, and further images of a sample. The exit
    code is 1 if there is any problem.
    """
    from stack.data.lint import lint as problems_of
    from stack.data.remote import CacheConfig, ShardCache
    from stack.data.sources import find_shards
    from stack.log import progress

    num_shards, num_problems, num_samples, num_bytes = len(find_shards(shards)), 0, 0, 0
    # While its bar is drawn on a terminal, rich sends what is printed there, above the bar: a file must not lose it.
    output = None if sys.stdout.isatty() else sys.stdout
    with progress("lint", num_shards, "shard") as advance:

        def report(samples: int, size: int) -> None:
            nonlocal num_samples, num_bytes
            num_samples, num_bytes = num_samples + samples, num_bytes + size
            advance(1, f"{num_problems:,} problems")

        for problem in problems_of(shards, folder, ShardCache(CacheConfig(dir=cache)), report):
            num_problems += not problem.is_note
            click.echo(str(problem), file=output)
    found = f"{num_problems:,} problem{'s' * (num_problems != 1)}" if num_problems else "no problem"
    click.echo(f"{found} in {num_samples:,} samples of {num_shards:,} shards, {num_bytes / 1e6:,.1f} MB")
    if num_problems:
        raise click.exceptions.Exit(1)


@command.command()
@click.argument("shards", type=LOCATION)
@click.option("-o", "--out", required=True, type=PATH, help="HTML file to write.")
@click.option("--count", type=click.IntRange(min=1), default=24, show_default=True, help="Samples to show.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which samples are shown.")
@_buckets
@click.option("--autoencoder", type=LOCATION, help="Of pre-encoded SHARDS: a folder or hub id, to decode the latents.")
@click.option(
    "--source", type=LOCATION, help="Of pre-encoded SHARDS: the raw ones, to show the originals beside the latents."
)
@_folders
def preview(
    shards: str,
    out: Path,
    count: int,
    seed: int,
    autoencoder: str | None,
    source: str | None,
    folder: Path | None,
    cache: Path | None,
    **buckets: Any,
) -> None:
    """Write an HTML page of what a model will see of SHARDS (a folder, a .tar, a glob or a URL).

    Raw shards need --resolution: each image is shown with the crop to its bucket. Of pre-encoded shards the latents are
    shown, decoded by --autoencoder.
    """
    from stack.data.preview import preview as write
    from stack.data.remote import CacheConfig, ShardCache

    store = ShardCache(CacheConfig(dir=cache))
    shown = write(shards, out, count, seed, store, folder, _rule(buckets), autoencoder, source)
    click.echo(f"{out}: {shown:,} samples")


@command.command()
@click.argument("out", type=PATH)
@click.option("--seed", type=SEED, default=0, show_default=True)
def encoders(out: Path, seed: int) -> None:
    """Write small untrained text encoders (t5, clip_l, clip_g) into OUT, for trying things without a download."""
    from stack.text.encoders import write_untrained_encoders

    write_untrained_encoders(out, seed)
    click.echo(f"{out}: t5, clip_l, clip_g with random weights of seed {seed}")
