"""The options of commands that draw images: keys of `stack.train.sampler.SamplerConfig`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

KEYS = {"steps": "steps", "solver": "solver", "guidance": "guidance.scale", "shift": "shift"}


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds them to a command, which gets what was given as `sampling`: dotted overrides."""

    @click.option("--steps", type=int, help="Solver steps; as in the run's sample grids if not given, like the next.")
    @click.option("--solver", help="euler, heun, dpm_solver_pp_2m, ddim, …")
    @click.option("--guidance", type=float, help="Scale of classifier-free guidance; 1 is none.")
    @click.option("--shift", type=float, help="Resolution shift of the time grid.")
    @click.option(
        "--set",
        "others",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other key of the sampler: eta=0.5, guidance.rescale=0.7, guidance.interval=[0.2,0.8].",
    )
    @functools.wraps(command)
    def with_options(*, others: tuple[str, ...], **given: Any) -> Any:
        values = {key: given.pop(option) for option, key in KEYS.items()}
        sampling = tuple(f"{key}={value}" for key, value in values.items() if value is not None)
        return command(sampling=(*sampling, *others), **given)

    return with_options
