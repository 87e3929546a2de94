"""Types of command-line arguments: paths, shards and seeds are checked and expanded as in a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stack.config import MAX_INT, local_path, location
from stack.shown import redact


class _LocalPath(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return local_path(str(value))
        except ValueError as error:
            self.fail(f"{redact(repr(str(value)))}: {error}", param, ctx)


class _Location(click.ParamType):
    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return location(str(value))
        except ValueError as error:
            self.fail(f"{redact(repr(str(value)))}: {error}", param, ctx)


PATH = _LocalPath()
"""A path on this machine, as `pathlib.Path`."""

LOCATION = _Location()
"""A path, glob, brace list, hub id or URL, as text."""

SEED = click.IntRange(0, MAX_INT - 1)
