"""Snapshots: averaged weights in one safetensors, the configuration in its metadata. All that other jobs ever read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stack.config import UserError
from stack.files import publish


class Snapshot(NamedTuple):
    path: Path
    step: int
    metadata: dict[str, Any]
    weights: dict[str, Tensor]


def write(run: Path, step: int, weights: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Publish snapshots/STEP.safetensors (mode 0644) by rename."""
    from safetensors.torch import save_file

    path = run / "snapshots" / f"{step:08d}.safetensors"
    with publish(path) as temporary:
        save_file(weights, temporary, metadata={"config": json.dumps({**metadata, "step": step})})
    return path


def steps(run: Path) -> list[int]:
    return sorted(int(p.stem) for p in (run / "snapshots").glob("*.safetensors") if p.stem.isdigit())


def read(run: Path, step: int | None = None) -> Snapshot:
    """The snapshot of `step`, or the newest. UserError where the run has none."""
    from safetensors import SafetensorError, safe_open

    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    known = steps(run)
    if not known or (step is not None and step not in known):
        wanted = "" if step is None else f" of step {step} (it has: {', '.join(map(str, known)) or 'none'})"
        raise UserError(f"{run}: no snapshot{wanted}; a run writes them every snapshot.every steps and at its end")
    path = run / "snapshots" / f"{step if step is not None else known[-1]:08d}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a snapshot of this stack: {error}") from None
    return Snapshot(path, metadata["step"], metadata, weights)
