"""`mmdit preencode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.arguments import PATH

if TYPE_CHECKING:
    from stack.preencode.job import PreencodeConfig

_SHOWN = 10  # samples that differ


@click.command("preencode")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--verify", type=click.IntRange(min=1), metavar="N", help="Encode N finished samples again, and compare.")
def command(config: Path, overrides: tuple[str, ...], verify: int | None) -> None:
    """Encode the shards that CONFIG names. OVERRIDES are dotted keys: source=PATH out=PATH.

    Finished shards are skipped. Start it several times on one folder to share the work.

    With --verify no shard is written: samples spread evenly over the finished set are encoded again from the source.
    The exit code is 1 if one differs from what is stored by more than rounding explains.
    """
    from stack import config as configuration
    from stack.preencode.job import PreencodeConfig, preencode

    resolved = configuration.load(PreencodeConfig, config, overrides)
    resolved = resolved.model_copy(update={"out": resolved.out.resolve()})  # a link may be pointed elsewhere meanwhile
    if verify is not None:
        _verify(resolved, verify)
        return
    manifest = preencode(resolved)
    click.echo(f"{resolved.out}: {manifest.samples:,} samples, {manifest.rejected:,} left out")


def _verify(config: PreencodeConfig, count: int) -> None:
    from stack.preencode.verify import verify

    result = verify(config, count)
    click.echo(f"{'tensor':14} {'values':>14} {'equal':>9} {'largest difference':>19} {'lowest cosine':>14}")
    for name, tensor in sorted(result.tensors.items()):
        equal = f"{100 * tensor.equal / tensor.values:.3f} %"
        click.echo(f"{name:14} {tensor.values:14,} {equal:>9} {tensor.largest:19.3g} {tensor.cosine:14.7f}")
    for failure in result.failures[:_SHOWN]:
        click.echo(failure)
    beyond = f"{len(result.failures):,} beyond what rounding explains" if result.failures else "all agree"
    click.echo(f"{config.out}: {result.samples:,} samples encoded again, {beyond}")
    if result.failures:
        raise click.exceptions.Exit(1)
