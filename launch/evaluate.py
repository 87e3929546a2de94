"""`mmdit evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--scenes", default=0, show_default=True, help="Judge so many samples of each kind of drawn scene.")
@click.option(
    "--steps", type=int, help="Solver steps; as in the run's own sample grids if not given, like the next two."
)
@click.option("--guidance", type=float, help="Classifier-free guidance; 1 is none.")
@click.option("--shift", type=float, help="Resolution shift of the time grid.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def command(
    run: Path,
    overrides: tuple[str, ...],
    step: int | None,
    scenes: int,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    seed: int,
    batch_size: int,
) -> None:
    """Validation loss of RUN at t = i/8 on fixed noise and, with --scenes N, accuracy on drawn scenes.

    Appends to RUN/eval.jsonl and prints the result as JSON. OVERRIDES are dotted keys of the run's configuration: where
    its data has moved (data.path=PATH), or has a URL with a password, which is not saved.
    """
    from stack.evaluate.run import evaluate

    asked = {"steps": steps, "guidance": guidance, "shift": shift}
    given = {key: value for key, value in asked.items() if value is not None}
    result = evaluate(run, step, scenes, given, seed, batch_size, overrides)
    click.echo(json.dumps(result, indent=1))
