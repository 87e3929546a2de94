"""`mmdit evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--scenes", default=0, show_default=True, help="Judge so many samples of each kind of drawn scene.")
@click.option("--steps", default=20, show_default=True, help="Solver steps.")
@click.option("--guidance", default=4.0, show_default=True, help="Classifier-free guidance; 1 is none.")
@click.option("--shift", default=1.0, show_default=True, help="Resolution shift of the time grid.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
def command(
    run: Path, step: int | None, scenes: int, steps: int, guidance: float, shift: float, seed: int, batch_size: int
) -> None:
    """Validation loss of RUN at t = i/8 on fixed noise and, with --scenes N, accuracy on drawn scenes.

    Appends to RUN/eval.jsonl and prints the result as JSON.
    """
    from stack.config import validate
    from stack.evaluate.run import evaluate
    from stack.train.sampler import SamplerConfig

    values = {"steps": steps, "guidance": guidance, "shift": shift, "batch_size": batch_size}
    result = evaluate(run, step, scenes, validate(SamplerConfig, values, "options"), seed, batch_size)
    click.echo(json.dumps(result, indent=1))
