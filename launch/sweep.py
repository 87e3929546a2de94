"""`mmdit sweep`: one training a combination of values, as one job array, and a table of where they stand.

    DIR/sweep.yaml     what was asked: the sweep, each trial's values and jobs
    DIR/runs/NNN/      a trial's run, as `mmdit train` makes it
    DIR/jobs/          submitit's files and the jobs' logs

In Python:

    from launch.sweep import SweepConfig, rows, start

    sweep = SweepConfig(config="configs/train/x.yaml", parameters={"optim.lr": [1e-4, 1e-3]})
    start(sweep, Path("runs/sweep/x"))  # on this machine, returns when all have ended; rows(folder) then has them
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from launch.arguments import PATH
from launch.submit import Command, Resources, State, Submitted, states, submit, submitted
from launch.submit import cancel as cancel_jobs
from stack import config as configuration
from stack.config import Config, Seed, UserError
from stack.files import lock, publish
from stack.shown import printable, redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

POLL_S = 2.0
CANCELLED = "cancelled"  # the file that tells whoever runs the trials here
Value = bool | int | float | str | list[Any] | None


class Parameter(Config):
    """What a parameter can be: one of the four. A list in the YAML file is `choice`."""

    choice: list[Value] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    """Both ends included."""

    @model_validator(mode="before")
    @classmethod
    def _list(cls, given: Any) -> Any:
        if not isinstance(given, list | dict | Parameter):
            raise ValueError("give a list of values, or {uniform: [low, high]}, or log_uniform or integer")
        return {"choice": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _check(self) -> Parameter:
        if [self.choice, self.uniform, self.log_uniform, self.integer].count(None) != 3:
            raise ValueError("give one of choice, uniform, log_uniform, integer")
        for low, high in filter(None, (self.uniform, self.log_uniform, self.integer)):
            if low >= high or (self.log_uniform and low <= 0):
                raise ValueError(f"[{low}, {high}]: expected low < high{' and both positive' * bool(self.log_uniform)}")
        return self

    def value(self, draw: random.Random) -> Value:
        """A random one. Four digits of a number: what the table shows is what is used."""
        if self.choice is not None:
            return draw.choice(self.choice)
        if self.integer:
            return draw.randint(*self.integer)
        if self.log_uniform:
            return float(f"{math.exp(draw.uniform(*map(math.log, self.log_uniform))):.4g}")
        return float(f"{draw.uniform(*self.uniform or (0, 1)):.4g}")


class MetricConfig(Config):
    name: str = "val_loss"
    """A key of the lines in metrics.jsonl."""
    goal: Literal["min", "max"] = "min"

    def best(self, points: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
        """Of (step, value) pairs, the one with the best value."""
        return (min if self.goal == "min" else max)(points, key=lambda point: point[1], default=None)


class SweepConfig(Config):
    config: Path
    """The training configuration that all trials begin with; beside the sweep's own file, if relative."""
    overrides: tuple[str, ...] = ()
    """Of all trials: optim.betas=[0.9,0.95]."""
    parameters: dict[str, Parameter]
    """Dotted key → values to try, or how one is drawn."""
    trials: PositiveInt | None = None
    """So many random draws; every combination of the lists if not given."""
    seed: Seed = 0
    metric: MetricConfig = MetricConfig()
    resources: Resources = Resources()
    """Of each trial's job."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if not self.parameters:
            raise ValueError("parameters: name one at least")
        for key, parameter in self.parameters.items():
            if key == "run.dir":
                raise ValueError("parameters: run.dir is each trial's own folder")
            if parameter.choice is None and self.trials is None:
                raise ValueError(f"parameters: {key} is drawn at random, so give trials, the number of draws")
        return self

    def draws(self) -> list[dict[str, Value]]:
        """The values of each trial."""
        if self.trials is None:
            lists = [parameter.choice or [] for parameter in self.parameters.values()]
            return [dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*lists)]
        draw = random.Random(self.seed)
        return [{key: p.value(draw) for key, p in self.parameters.items()} for _ in range(self.trials)]


class Trial(Config):
    name: str
    values: dict[str, Value]
    steps: PositiveInt
    fingerprint: str
    """Of its whole configuration."""
    job: Submitted | None = None
    """The newest one."""
    slot: NonNegativeInt = 0
    """On this machine, which of those that run at once it is, and so which GPUs are its own."""


class Record(Config):
    """DIR/sweep.yaml."""

    sweep: SweepConfig
    """As it was asked for last."""
    trials: list[Trial]


@dataclass
class Row:
    """One trial as the table shows it."""

    name: str
    values: dict[str, Value]
    state: Literal["waiting", "queued", "running", "finished", "failed", "stopped"]
    reason: str
    step: int
    steps: int
    loss: float | None
    best: float | None
    best_step: int | None
    curve: list[tuple[int, float]]
    """(step, metric)"""


def load(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep that the YAML file `path` describes. Raises UserError."""
    sweep = configuration.load(SweepConfig, path, overrides)
    return sweep.model_copy(update={"config": Path(os.path.normpath(path.parent / sweep.config))})


def _read(folder: Path) -> Record:
    path = folder / "sweep.yaml"
    if not path.exists():
        raise UserError(f"{folder}: no sweep was started here, there is no sweep.yaml")
    return configuration.load(Record, path)


def _write(folder: Path, record: Record) -> None:
    with publish(folder / "sweep.yaml") as temporary:
        temporary.write_text(configuration.dump(record), encoding="utf-8")


def _arguments(sweep: SweepConfig, folder: Path, name: str, values: dict[str, Value]) -> tuple[str, ...]:
    own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return ("train", str(sweep.config), *sweep.overrides, *own, f"run.dir={folder / 'runs' / name}")


def trials(sweep: SweepConfig, folder: Path) -> list[Trial]:
    """The trials, each one's configuration loaded and checked. Raises UserError naming what is wrong."""
    from stack.data.plan import check_division
    from stack.train.recipe import TrainConfig
    from stack.train.schedule import steps_of

    found = []
    for number, values in enumerate(sweep.draws()):
        name = f"{number:03d}"
        _, path, *overrides = _arguments(sweep, folder, name, values)
        if secret := next((text for text in overrides if redact(text) != text), None):
            raise UserError(f"{redact(secret)}: a sweep's values are written to a file; credentials belong elsewhere")
        config = configuration.load(TrainConfig, path, overrides)
        size = config.data.batch_size
        check_division(size, sweep.resources.tasks, config.parallel.accumulate)
        steps = steps_of(config.schedule.steps, size)
        public = configuration.public(config)
        public["run"].pop("dir")
        found.append(Trial(name=name, values=values, steps=steps, fingerprint=configuration.fingerprint_of(public)))
    return found


def start(sweep: SweepConfig, folder: Path, show: Callable[[list[Row]], None] = lambda rows: None) -> None:
    """Submit the trials that have not finished: to Slurm at once, on this machine as others end, until all have ended.

    show: called with the table's rows while it waits.
    Raises UserError, with nothing submitted, where a trial's configuration is wrong or the folder has another sweep.
    """
    sweep = sweep.model_copy(update={"resources": sweep.resources.resolved()})
    asked = trials(sweep, folder)
    with lock(folder / ".lock") as mine:
        if not mine:
            raise UserError(f"{folder}: another process runs the trials of this sweep")
        (folder / CANCELLED).unlink(missing_ok=True)
        record = Record(sweep=sweep, trials=_with_jobs(asked, folder))
        _write(folder, record)
        todo = [n for n, state in enumerate(_states(folder, record)) if state is None or _again(state)]
        if sweep.resources.cluster == "slurm":
            _submit(folder, record, todo)
        else:
            _run_here(folder, record, todo, show)


def _with_jobs(asked: list[Trial], folder: Path) -> list[Trial]:
    """The trials, with the jobs that the folder's sweep has given them."""
    if not (folder / "sweep.yaml").exists():
        return asked
    known = _read(folder).trials
    if [trial.fingerprint for trial in known] != [trial.fingerprint for trial in asked]:
        raise UserError(f"{folder} holds another sweep: its trials differ from these; give --dir a new folder")
    return known


def _states(folder: Path, record: Record) -> list[State | None]:
    """Of each trial's newest job; None before it has one."""
    found = iter(states(folder / "jobs", [trial.job for trial in record.trials if trial.job]))
    return [next(found) if trial.job else None for trial in record.trials]


def _again(state: State) -> bool:
    return not state.alive and state.name != "finished"


def _submit(folder: Path, record: Record, todo: Sequence[int], slot: int = 0) -> None:
    """Give each trial of `todo` a job, and write it down."""
    if not todo:
        return
    chosen = [record.trials[number] for number in todo]
    commands = [
        Command(_arguments(record.sweep, folder, trial.name, trial.values), folder / "runs" / trial.name)
        for trial in chosen
    ]
    jobs = submit(commands, record.sweep.resources, folder / "jobs", slot)
    for number, trial, job in zip(todo, chosen, jobs, strict=True):
        record.trials[number] = trial.model_copy(update={"job": submitted(job), "slot": slot})
    _write(folder, record)


def _run_here(folder: Path, record: Record, todo: list[int], show: Callable[[list[Row]], None]) -> None:
    """Keep `parallel` trials running on this machine, each with GPUs of its own, until all have ended."""
    waiting, parallel = list(todo), record.sweep.resources.parallel or 1
    while True:
        alive = [number for number, state in enumerate(_states(folder, record)) if state and state.alive]
        cancelled = (folder / CANCELLED).exists()
        if cancelled:
            cancel_jobs(folder / "jobs", [job for number in alive if (job := record.trials[number].job)])
        while waiting and len(alive) < parallel and not cancelled:
            number = waiting.pop(0)
            taken = {record.trials[other].slot for other in alive}
            _submit(folder, record, [number], min(set(range(parallel)) - taken))
            alive.append(number)
        show(rows(folder))
        if not alive:
            return
        time.sleep(POLL_S)


def cancel(folder: Path) -> int:
    """Ask all jobs of a sweep to end; how many there were. `start` goes on with the sweep."""
    record = _read(folder)
    (folder / CANCELLED).touch()
    pairs = zip(record.trials, _states(folder, record), strict=True)
    jobs = [trial.job for trial, state in pairs if trial.job and state and state.alive]
    cancel_jobs(folder / "jobs", jobs)
    return len(jobs)


def rows(folder: Path) -> list[Row]:
    """Where each trial of the sweep in `folder` stands, by its job and its run's metrics."""
    from stack.log import metrics_of

    record = _read(folder)
    name, found = record.sweep.metric.name, []
    for trial, state in zip(record.trials, _states(folder, record), strict=True):
        step, loss, curve = 0, None, []
        for line in metrics_of(folder / "runs" / trial.name):
            step, loss = line["step"], line.get("loss", loss)
            if line.get(name) is not None:
                curve.append((step, line[name]))
        best_step, best = record.sweep.metric.best(curve) or (None, None)
        found.append(
            Row(
                name=trial.name,
                values=trial.values,
                state=state.name if state else "waiting",
                reason=state.reason if state else "",
                step=step,
                steps=trial.steps,
                loss=loss,
                best=best,
                best_step=best_step,
                curve=curve,
            )
        )
    return found


def varied(found: Sequence[Row]) -> list[str]:
    """The parameters of which the trials have more than one value."""
    keys = found[0].values
    return [key for key in keys if len({json.dumps(row.values[key]) for row in found}) > 1] or list(keys)


def results(folder: Path) -> list[Row]:
    """The rows, written to DIR/results.csv and drawn in DIR/results.png."""
    metric, found = _read(folder).sweep.metric.name, rows(folder)
    keys = list(found[0].values)
    with publish(folder / "results.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", *keys, "state", "step", "steps", "loss", f"best {metric}", "at step", "reason"])
        for row in found:
            told = (row.state, row.step, row.steps, row.loss, row.best, row.best_step, _last_line(row.reason))
            writer.writerow([row.name, *(row.values[key] for key in keys), *told])
    _draw(found, metric, folder / "results.png")
    return found


def _draw(found: Sequence[Row], metric: str, path: Path) -> None:
    """The metric over the steps of each trial, and its best value over each parameter that varies."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    keys, told = varied(found), [row for row in found if row.curve]
    figure = Figure(figsize=(4.2 * (len(keys) + 1), 3.6), layout="constrained")
    curves, *panels = figure.subplots(1, len(keys) + 1, squeeze=False)[0]
    for row in told:
        curves.plot(*zip(*row.curve, strict=True), "o-", markersize=3, linewidth=1.2, label=row.name)
    curves.set_xlabel("step")
    if 0 < len(told) <= 10:
        curves.legend(title="trial", fontsize="small")
    for key, axes in zip(keys, panels, strict=True):
        _points(axes, told, key)
    for axes in (curves, *panels):
        axes.set_ylabel(metric if axes is curves else f"best {metric}")
        axes.grid(alpha=0.3)
    if without := [row.name for row in found if not row.curve]:
        figure.suptitle(f"without {metric}: {', '.join(without)}", fontsize="small")
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _points(axes: Axes, told: Sequence[Row], key: str) -> None:
    values: list[Any] = [row.values[key] for row in told]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        values = [_shown(value) for value in values]
    elif values and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    best: list[Any] = [row.best for row in told]
    axes.plot(values, best, "o")
    for row, x, y in zip(told, values, best, strict=True):
        axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize="x-small")
    axes.set_xlabel(key)
    axes.margins(0.12)


def _shown(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False).strip('"')


def _last_line(text: str) -> str:
    return printable(text.strip().rpartition("\n")[2])


def table(found: Sequence[Row], metric: str) -> Table:
    """The rows as rich shows them."""
    from rich.table import Table
    from rich.text import Text

    keys = varied(found)
    shown = Table("trial", *keys, "state", "step", "loss", f"best {metric}", "note", highlight=False)
    styles = {"finished": "green", "failed": "red", "stopped": "yellow", "running": "bold"}
    for row in found:
        number = ["" if value is None else f"{value:.4f}" for value in (row.loss, row.best)]
        shown.add_row(
            row.name,
            *(_shown(row.values[key]) for key in keys),
            Text(row.state, style=styles.get(row.state, "")),
            f"{row.step}/{row.steps}",
            number[0],
            number[1] + (f" at {row.best_step}" if row.best_step is not None else ""),
            Text(_last_line(row.reason)),
        )
    return shown


@contextmanager
def _display(metric: str) -> Iterator[Callable[[list[Row]], None]]:
    """A table that is kept up to date on a terminal; elsewhere a line for each change, and the table at the end."""
    from rich.live import Live

    console = _console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda found: live.update(table(found, metric), refresh=True)
        return
    seen: dict[str, str] = {}
    newest: list[Row] = []

    def tell(found: list[Row]) -> None:
        for row in found:
            if seen.get(row.name) != row.state:
                seen[row.name] = row.state
                click.echo(f"{row.name} {row.state}{f': {_last_line(row.reason)}' if row.reason else ''}", err=True)
        newest[:] = found

    yield tell
    if newest:
        console.print(table(newest, metric))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _follow(folder: Path, show: Callable[[list[Row]], None]) -> None:
    """Show the rows until every trial has ended."""
    while True:
        found = rows(folder)
        show(found)
        going = {"queued", "running"} if (folder / CANCELLED).exists() else {"queued", "running", "waiting"}
        if not going & {row.state for row in found}:
            return
        time.sleep(POLL_S)


@click.group("sweep")
def command() -> None:
    """Train once for each combination of values, as jobs on Slurm or on this machine."""


@command.command("run")
@click.argument("path", metavar="SWEEP.yaml", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--dir", "folder", type=PATH, help="The sweep's folder; runs/sweep/NAME by default.")
@click.option("--cluster", type=click.Choice(["auto", "slurm", "local"]), help="The same as resources.cluster=…")
@click.option("--watch", is_flag=True, help="Stay until all trials have ended, as it does on this machine anyway.")
@click.option("--dry-run", is_flag=True, help="Check every trial's configuration and list the trials; submit nothing.")
def run_command(
    path: Path, overrides: tuple[str, ...], folder: Path | None, cluster: str | None, watch: bool, dry_run: bool
) -> None:
    """Submit the trials of SWEEP.yaml, or those that have not finished where its folder knows them.

    OVERRIDES are dotted keys of SWEEP.yaml: resources.partition=gpu trials=30. Exit code 1: it stayed, and some trials
    have not finished; the table names the reason.
    """
    sweep = load(path, (*overrides, *([f"resources.cluster={cluster}"] if cluster else [])))
    folder = folder or Path("runs/sweep") / path.stem
    if dry_run:
        for trial in trials(sweep, folder):
            click.echo(f"{trial.name}  {'  '.join(f'{key}={_shown(value)}' for key, value in trial.values.items())}")
        return
    with _display(sweep.metric.name) as show:
        start(sweep, folder, show)
        if watch:
            _follow(folder, show)
    found = {row.state for row in rows(folder)}
    if found & {"waiting", "failed", "stopped"}:
        raise click.exceptions.Exit(1)
    if found & {"queued", "running"}:
        click.echo(f"submitted; mmdit sweep status {folder} --watch shows the trials")


_folder = click.argument("folder", metavar="DIR", type=PATH)


@command.command("status")
@_folder
@click.option("--watch", is_flag=True, help="Until all trials have ended.")
def status_command(folder: Path, watch: bool) -> None:
    """Show where each trial stands."""
    metric = _read(folder).sweep.metric.name
    if not watch:
        _console().print(table(rows(folder), metric))
        return
    with _display(metric) as show:
        _follow(folder, show)


@command.command("results")
@_folder
def results_command(folder: Path) -> None:
    """Show the table, and write it to DIR/results.csv and drawn to DIR/results.png."""
    _console().print(table(results(folder), _read(folder).sweep.metric.name))
    click.echo(f"{folder / 'results.csv'}  {folder / 'results.png'}")


@command.command("cancel")
@_folder
def cancel_command(folder: Path) -> None:
    """End all jobs. What they have saved is kept: `mmdit sweep run` goes on with it."""
    count = cancel(folder)
    click.echo(f"{folder}: asked {count} job{'s' * (count != 1)} to end")
