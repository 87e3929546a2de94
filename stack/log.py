"""Rank-0 console, `metrics.jsonl` (the truth) and wandb (its mirror)."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from stack import dist
from stack.config import Config
from stack.files import publish
from stack.lines import LineFile, read_lines
from stack.shown import printable, redact

FINISH_S = 60
"""Seconds that a run waits at its end for wandb's uploads; `wandb sync` sends what is left."""
_WANDB = "wandb.json"  # in a run's folder: the id of its wandb run


class LogConfig(Config):
    every: PositiveInt = 10
    """Steps between two lines of metrics."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    project: str = "mmdit"
    keys: bool = False
    """Write the keys of every step's samples to keys.jsonl."""


def say(message: str) -> None:
    """Rank 0's standard error, whole lines even while a progress bar is drawn."""
    if dist.rank() == 0:
        from rich.console import Console

        lines = [printable(line) for line in redact(message).split("\n")]
        Console(stderr=True, highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
    """A function `advance(n, note=None)` that moves a rich bar on a terminal and prints plain lines elsewhere."""
    if dist.rank() != 0:
        yield lambda n=1, note=None: None
        return
    if sys.stderr.isatty():
        yield from _bar(description, total, unit, done)
    else:
        yield from _lines(description, total, unit, done)


def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[speed]}")
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(description, total=total, completed=done, note="", speed="")

        def advance(n: int = 1, note: str | None = None) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, advance=n, speed=f"{speed:.1f} {unit}/s" if speed else "")
            if note is not None:
                bar.update(task, note=note)

        yield advance


def _lines(description: str, total: int, unit: str, done: int) -> Iterator[Any]:
    import time

    began, first, last, shown = time.monotonic(), done, time.monotonic(), ""

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal done, last, shown
        done += n
        shown = shown if note is None else note
        now = time.monotonic()
        if now - last > 10 or done >= total:
            last = now
            speed = (done - first) / max(now - began, 1e-9)
            left = (total - done) / max(speed, 1e-9)
            say(f"{description} {done}/{total} {speed:.1f} {unit}/s, {left:.0f} s left  {shown}".rstrip())

    yield advance


class Tracker:
    """The wandb run `run_id`, a new one if None. Whatever its service does never ends what is tracked.

    values: the configuration, of the training that owns the run. An evaluator, which has none, adds lines of its own
    to it: online by wandb's shared mode, which both then need, offline by a folder with the same id.
    """

    def __init__(self, run: Path, config: LogConfig, run_id: str | None, values: dict[str, Any] | None):
        self.run_id = run_id
        self._run: Any = None
        if config.wandb == "disabled":
            return
        owner = values is not None
        try:
            import wandb
            from wandb.sdk.lib import import_hooks

            (run / "wandb").mkdir(exist_ok=True)
            with _without_secrets(sys.argv):
                self._run = wandb.init(
                    project=config.project,
                    name=run.name,
                    dir=run,
                    id=run_id,
                    resume="allow",
                    mode="shared" if config.wandb == "online" else "offline",
                    config=values,
                    settings=wandb.Settings(
                        silent=True, x_primary=owner, x_update_finish_state=owner, finish_timeout=FINISH_S
                    ),
                )
            # Its hooks would count each import from here on, and fail with it once the service is gone.
            import_hooks.unregister_all_post_import_hooks()
            self.run_id = self._run.id
            if owner:
                self._run.define_metric("*", step_metric="step")
                with publish(run / _WANDB) as temporary:
                    temporary.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")
            else:
                self._run.define_metric("eval/*", step_metric="eval/step")
        except OSError as error:
            say(f"{run}: of the wandb run not all is written ({error})" if self._run else f"wandb is off: {error}")
        except Exception as error:
            say(f"wandb is off: {error}")

    @classmethod
    def join(cls, run: Path, config: LogConfig) -> Tracker | None:
        """An evaluator's, for the wandb run of the training in the folder `run`; None if it has none."""
        run_id = _known_id(run)
        return None if run_id is None else cls(run, config, run_id, None)

    def log(self, values: dict[str, Any]) -> None:
        self._call("log", values)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any) -> None:
        if self._run is not None:
            try:
                getattr(self._run, method)(*arguments)
            except Exception as error:
                say(f"wandb is off from here: {error}")
                self._run = None


def _known_id(run: Path) -> str | None:
    """The id of the wandb run that a training in this folder has begun, even if it ended before its first checkpoint.

    None if there is none, or wandb.json is damaged.
    """
    path = run / _WANDB
    try:
        found = json.loads(path.read_bytes())["id"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        say(f"{path} cannot be read ({error}): without its id, a new wandb run begins")
        return None
    if not isinstance(found, str) or not re.fullmatch(r"[\w-]{1,64}", found):
        say(f"{path}: {found!r} is no id of a wandb run: a new one begins")
        return None
    return found


class Metrics:
    """Writes one JSON object per line on rank 0. Lines after `resume_step`, of a lost future, are cut off.

    An error of the file system ends nothing, see `LineFile`.
    """

    def __init__(self, run: Path, config: LogConfig, resume_step: int, run_id: str | None, values: dict[str, Any]):
        self.path = run / "metrics.jsonl"
        self.run_id = run_id
        self._wants_keys = config.keys
        self._files: list[LineFile] = []
        if dist.rank() != 0:
            return
        names = ("metrics.jsonl", "keys.jsonl") if config.keys else ("metrics.jsonl",)
        self._files = [LineFile(run / name, resume_step, say) for name in names]
        self._tracker = Tracker(run, config, run_id or _known_id(run), values)
        self.run_id = self._tracker.run_id

    @property
    def last(self) -> dict[str, Any]:
        """The last line that was written, in this life or the one before; on rank 0."""
        return self._files[0].last

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; `values` holds "step". What is not finite is written as null."""
        if dist.rank() != 0:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._files[0].append(finite)
        self._tracker.log(values)

    def write_keys(self, step: int, keys: list[str]) -> None:
        """The keys of this rank's samples of `step`, where they are wanted. A collective."""
        if self._wants_keys:
            of_ranks = dist.all_gather(keys)
            if self._files:
                self._files[1].append({"step": step, "keys": sorted(k for of in of_ranks for k in of)})

    def sync(self) -> bool:
        """Bring the lines to the disk: a checkpoint should not be ahead of them. False if some could not be written,
        which are kept."""
        stored = [file.sync() for file in self._files]
        return all(stored)

    def close(self) -> None:
        if dist.rank() == 0:
            for file in self._files:
                file.close()
            self._tracker.finish()


@contextmanager
def _without_secrets(arguments: list[str]) -> Iterator[None]:
    """For wandb, which keeps the command line and all that begins with SLURM_ in the environment."""
    before, token = list(arguments), os.environ.pop("SLURM_JWT", None)
    arguments[:] = map(redact, before)
    try:
        yield
    finally:
        arguments[:] = before
        if token is not None:
            os.environ["SLURM_JWT"] = token


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl. A line that a kill cut off is skipped, and a damaged one."""
    return list(metrics_of(run))


def metrics_of(run: Path) -> Iterator[dict[str, Any]]:
    """As `read_metrics`, one line at a time: a long run has millions."""
    return read_lines(run / "metrics.jsonl")
