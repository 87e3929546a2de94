"""`mmdit export`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--replace", is_flag=True, help="Replace the folder where it exists.")
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--samples", default=2048, show_default=True, help="Images for an autoencoder's latent statistics.")
def command(run: Path, overrides: tuple[str, ...], out: Path, replace: bool, step: int | None, samples: int) -> None:
    """Write the averaged weights of RUN: an MM-DiT as safetensors with its config, an autoencoder as a diffusers folder
    whose scale and shift are measured on the training images. OVERRIDES are dotted keys of the run's configuration:
    where its images have moved (data.source=PATH), or have a URL with a password, which is not saved."""
    from stack.export.weights import export

    facts = export(run, out, step, samples, replace, overrides)
    click.echo(f"{out}: {json.dumps(facts)}")
