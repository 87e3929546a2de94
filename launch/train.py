"""`mmdit train`."""

from __future__ import annotations

from pathlib import Path

import click

from launch.arguments import PATH


@click.command("train")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--ranks", default=1, show_default=True, help="Processes to start on this machine.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved configuration, train nothing.")
def command(config: Path, overrides: tuple[str, ...], ranks: int, dry_run: bool) -> None:
    """Train what CONFIG describes, or go on with it where its run folder has checkpoints.

    OVERRIDES are dotted keys: optim.lr=1e-4 run.dir=runs/x. Exit code 85: asked to stop by a signal, saved; the same
    command goes on.
    """
    from stack.train.preempt import held_back

    with held_back():
        _train(config, overrides, ranks, dry_run)


def _train(config: Path, overrides: tuple[str, ...], ranks: int, dry_run: bool) -> None:
    from launch import environment
    from stack import config as configuration
    from stack.data.plan import check_division
    from stack.train.recipe import TrainConfig

    if ranks < 1:
        raise click.BadParameter("at least 1", param_hint="--ranks")
    resolved = configuration.load(TrainConfig, config, overrides)
    if not environment.is_rank() and ranks > 1 and not dry_run:
        import torch

        if 0 < torch.cuda.device_count() < ranks:
            raise click.BadParameter(f"this machine has {torch.cuda.device_count()} GPUs", param_hint="--ranks")
        raise click.exceptions.Exit(environment.spawn(["train", str(config), *overrides], ranks))

    from stack import dist
    from stack.train.guard import NonFiniteError
    from stack.train.loop import train
    from stack.train.preempt import EXIT_CODE
    from stack.train.recipe import build, check

    if dry_run:
        check(resolved, dist.device())
        check_division(resolved.data.batch_size, ranks, resolved.parallel.accumulate)
        data, objective = build(resolved, dist.device(), previews=True)
        count = sum(p.numel() for p in objective.network.parameters())
        click.echo(configuration.dump(resolved))
        click.echo(f"{count:,} parameters, {data.num_samples:,} training samples", err=True)
        return
    dist.init()
    try:
        finished = train(resolved)
    except NonFiniteError as error:
        click.echo(f"mmdit: {error}", err=True)
        raise click.exceptions.Exit(1) from None
    dist.shutdown()
    if not finished:
        raise click.exceptions.Exit(EXIT_CODE)
