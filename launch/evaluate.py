"""`mmdit evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launch.arguments import PATH, SEED
from launch.sampling import options


@click.command("evaluate")
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--watch", is_flag=True, help="Evaluate every snapshot as it appears, until the run has finished.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=24,
    show_default=True,
    help="With --watch: hours without a sign of the training after which to give up.",
)
@click.option(
    "--nll", default=0, show_default=True, help="Bits a dimension of so many held-out images, for models of pixels."
)
@click.option("--nll-set", multiple=True, metavar="KEY=VALUE", help="How they are estimated: levels=17, trace=exact,"
              " probes=4, dequantizations=2, steps=100, bound=true (DDPM's variational bound).")  # fmt: skip
@click.option("--scenes", default=0, show_default=True, help="Judge so many samples of each kind of drawn scene.")
@click.option("--samples", default=0, show_default=True, help="Draw so many samples for the held-out captions, or of"
              " all classes.")  # fmt: skip
@click.option("--inception", type=PATH, help="InceptionV3's weights: FID and KID of the samples.")
@click.option("--reference", type=PATH, help="Folder of images to compare with, instead of the"
              " held-out ones.")  # fmt: skip
@click.option("--clip", type=PATH, help="Folder of an open_clip model: CLIP score of the samples.")
@options
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def command(
    run: Path,
    overrides: tuple[str, ...],
    step: int | None,
    watch: bool,
    patience: float,
    nll: int,
    nll_set: tuple[str, ...],
    **asked: object,
) -> None:
    """Validation loss of RUN at t = i/8 on fixed noise and, if asked for, bits a dimension, FID, KID and CLIP score of
    samples, and the accuracy on drawn scenes.

    RUN/eval.jsonl has a line for each snapshot and settings; this one is printed as JSON. OVERRIDES are dotted keys of
    the run's configuration: where its data has moved (data.path=PATH), or has a URL with a password, which is not kept.

    With --watch, RUN need not exist yet. Start it several times on a shared folder to share the work. Exit code 85:
    stopped by a signal; the same command goes on. Exit code 1: a snapshot could not be evaluated.
    """
    nll_keys = [f"nll.{key}" for key in (f"images={nll}", *nll_set)]
    if watch:
        _watch(run, step, asked, nll_keys, overrides, patience)
        return
    from stack.config import load
    from stack.evaluate.run import EvaluationConfig, evaluate

    config = load(EvaluationConfig, asked, nll_keys)
    click.echo(json.dumps(evaluate(run, step, config, overrides), indent=1))


def _watch(
    run: Path,
    step: int | None,
    asked: dict[str, object],
    nll_keys: list[str],
    overrides: tuple[str, ...],
    patience: float,
) -> None:
    from stack.train.preempt import EXIT_CODE, held_back

    with held_back():
        from stack.config import UserError, load
        from stack.evaluate.run import EvaluationConfig
        from stack.evaluate.watch import Stopped, watch

        if step is not None:
            raise UserError("--watch evaluates every snapshot: leave out --step")
        try:
            failed = watch(run.resolve(), load(EvaluationConfig, asked, nll_keys), overrides, 3600 * patience)
        except Stopped:
            raise click.exceptions.Exit(EXIT_CODE) from None
    if failed:
        click.echo(f"mmdit: {run}: could not evaluate the snapshots of steps {', '.join(map(str, failed))}", err=True)
        raise click.exceptions.Exit(1)
