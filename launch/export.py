"""`mmdit export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.arguments import PATH

if TYPE_CHECKING:
    from stack.export.weights import Target


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("-o", "--out", required=True, type=PATH, help="Folder or .safetensors to write.")
@click.option(
    "--to",
    "target",
    type=click.Choice(["stack", "diffusers", "single"]),
    help="Form of an MM-DiT: this stack's (a folder; the default), a diffusers pipeline's folder, or one .safetensors "
    "in the authors' names, for ComfyUI and others.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the MM-DiT's weights; float32 if not given.",
)
@click.option("--replace", is_flag=True, help="Replace what stands there.")
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--samples", default=2048, show_default=True, help="Images for an autoencoder's latent statistics.")
def command(
    run: Path,
    overrides: tuple[str, ...],
    out: Path,
    target: Target | None,
    dtype: str | None,
    replace: bool,
    step: int | None,
    samples: int,
) -> None:
    """Write the averaged weights of RUN.

    Of an MM-DiT in the form that --to names: diffusers is a whole pipeline with encoders, autoencoder and a model card.
    Of an autoencoder as a diffusers folder whose scale and shift are measured on the training images. OVERRIDES are
    dotted keys of the run's configuration: where its images have moved (data.source=PATH), or have a URL with a
    password, which is not saved."""
    import torch

    from stack.export.weights import export

    facts = export(run, out, step, samples, replace, overrides, target, getattr(torch, dtype) if dtype else None)
    click.echo(f"{out}: {json.dumps(facts)}")
