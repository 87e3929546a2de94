"""`mmdit preencode`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("preencode")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Encode the shards that CONFIG names. OVERRIDES are dotted keys: source=PATH out=PATH.

    Finished shards are skipped. Start it several times on one folder to share the work.
    """
    from stack import config as configuration
    from stack.preencode.job import PreencodeConfig, preencode

    resolved = configuration.load(PreencodeConfig, config, overrides)
    manifest = preencode(resolved)
    click.echo(f"{resolved.out}: {manifest.samples:,} samples, {manifest.rejected:,} left out")
