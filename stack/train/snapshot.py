"""Snapshots: averaged weights in one safetensors, the configuration in its metadata. All that other jobs ever read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PositiveInt
from torch import Tensor

from stack.claims import Claims
from stack.config import Config, UserError
from stack.files import probe, publish
from stack.log import say
from stack.train.schedule import Span, steps_of


class SnapshotConfig(Config):
    every: Span = 500
    """Steps between two snapshots, each with a validation loss and a sample grid; the last step always has one."""
    keep: PositiveInt | None = None
    """The newest ones kept; all if not given."""
    keep_every: Span | None = None
    """Also kept: those whose step is a multiple of this."""


class Snapshot(NamedTuple):
    path: Path
    step: int
    metadata: dict[str, Any]
    weights: dict[str, Tensor]


def write(run: Path, step: int, weights: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Publish snapshots/STEP.safetensors (mode 0644) by rename."""
    from safetensors.torch import save_file

    path = run / "snapshots" / f"{step:08d}.safetensors"
    for leftover in path.parent.glob(".*.tmp"):  # of a kill; nobody else writes here
        leftover.unlink()
    with publish(path) as temporary:
        save_file(weights, temporary, metadata={"config": json.dumps({**metadata, "step": step})})
    return path


def steps(run: Path) -> list[int]:
    return sorted(int(p.stem) for p in (run / "snapshots").glob("*.safetensors") if p.stem.isdigit())


def leases(run: Path) -> Claims:
    """Who reads which snapshot just now: an evaluator holds the claim STEP.SETTINGS meanwhile."""
    return Claims(run / "snapshots" / ".claims")


def retire(run: Path, newest: int, config: SnapshotConfig, batch_size: int) -> None:
    """Remove snapshots up to step `newest` that `config` does not keep, but none that an evaluator has leased."""
    if config.keep is None:
        return
    candidates = [step for step in steps(run) if step <= newest][: -config.keep]
    if config.keep_every is not None:
        candidates = [step for step in candidates if step % steps_of(config.keep_every, batch_size)]
    try:
        leased = {name.partition(".")[0] for name in leases(run).held()} if candidates else set()
        for step in candidates:
            if f"{step:08d}" not in leased:
                (run / "snapshots" / f"{step:08d}.safetensors").unlink(missing_ok=True)
    except OSError as error:
        say(f"{run / 'snapshots'}: old snapshots stay ({error}); training goes on")


def find(run: Path, step: int | None = None) -> int:
    """`step`, or that of the newest snapshot. UserError where the run has none."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    known = steps(run)
    if not known or (step is not None and step not in known):
        wanted = "" if step is None else f" of step {step} (it has: {', '.join(map(str, known)) or 'none'})"
        raise UserError(f"{run}: no snapshot{wanted}; a run writes them every snapshot.every steps and at its end")
    return known[-1] if step is None else step


def read(run: Path, step: int | None = None) -> Snapshot:
    """The snapshot of `step`, or the newest. UserError where the run has none."""
    from safetensors import SafetensorError, safe_open

    path = run / "snapshots" / f"{find(run, step):08d}.safetensors"
    probe(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a snapshot of this stack: {error}") from None
    return Snapshot(path, metadata["step"], metadata, weights)
