"""`mmdit`: one command a stage. Commands are imported when they are asked for, so that help answers at once."""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import io
import os
import sys
import traceback

import click

from stack.config import UserError, is_users
from stack.shown import printable, redact

COMMANDS = {
    "demo": "Draw, train, sample and evaluate a small model, and write a report.",
    "data": "Make, index, check and show shards.",
    "preencode": "Encode captioned images into latents and text embeddings.",
    "train": "Train an autoencoder or an MM-DiT.",
    "sample": "Draw images for prompts from a run.",
    "evaluate": "Validation loss and accuracy of a run.",
    "export": "Write a run's averaged weights for others to read.",
    "submit": "Run a command as a job, on Slurm or on this machine.",
    "sweep": "Train once for each combination of values.",
    "model": "List the model presets with parameters and FLOPs.",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"launch.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mmdit-stack")
def group() -> None:
    """Train text-to-image models: shards, pre-encoding, an MM-DiT rectified-flow trainer, sampling, evaluation."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on standard error and exit code 2, never a traceback."""
    try:
        ended = group.main(arguments, prog_name="mmdit", standalone_mode=False)
        return ended if isinstance(ended, int) else 0  # the code of click's Exit, which a command raises
    except click.Abort:
        click.echo("mmdit: stopped", err=True)
        return 130
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(redact(shown.getvalue()), nl=False, err=True)
        return error.exit_code
    except (UserError, OSError) as error:
        click.echo(f"mmdit: {_line(error)}", err=True)
        return 2 if isinstance(error, UserError) or is_users(error) else 1


def _line(error: Exception) -> str:
    return printable(redact(" ".join(str(error).split())))


def main() -> None:
    """Entry point of the `mmdit` command."""
    from launch.environment import STOPPED, record_exit, set_defaults

    set_defaults()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # the locale's encoding may be ASCII
    faulthandler.enable()  # a shard that is cut while it is mapped ends the process by SIGBUS: say where it was read
    try:
        code = run()
    except Exception:
        click.echo(redact(traceback.format_exc()), nl=False, err=True)
        code = 1
    record_exit(code)
    if code in (0, STOPPED):
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)  # the end of the interpreter aborts over a process group's threads, or waits for ranks that are gone


if __name__ == "__main__":
    main()
