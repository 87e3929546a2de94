"""Snapshots: averaged weights in one safetensors, the configuration in its metadata. All that other jobs ever read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from stack.claims import Claims
from stack.config import Config, UserError
from stack.files import probe, publish, remove_leftovers
from stack.log import say
from stack.train import origin
from stack.train.schedule import Span, step_of, steps_of

ANOTHER = "take another snapshot of the run, or remove this one, if it is the last, and start the training again"


class SnapshotConfig(Config):
    every: Span = 500
    """Steps between two snapshots, each with a validation loss and a sample grid; the last step always has one."""
    keep: PositiveInt | None = None
    """The newest ones kept; all if not given."""
    keep_every: Span | None = None
    """Also kept: those whose step is a multiple of this."""


class Metadata(dict[str, Any]):
    """A snapshot's metadata. UserError for a key that it lacks."""

    def __init__(self, path: Path, values: dict[str, Any]):
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: its metadata has no {key!r}: it is damaged, or of another version; {ANOTHER}")


class Snapshot(NamedTuple):
    path: Path
    step: int
    metadata: dict[str, Any]
    weights: dict[str, Tensor]

    def part(self, kind: Any, key: str) -> Any:
        """metadata[key] as `kind`, a type that pydantic reads. UserError where it is something else."""
        try:
            return TypeAdapter(kind).validate_python(self.metadata[key])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (key, *first["loc"])))
            raise UserError(f"{self.path}: its metadata is damaged, {place}: {first['msg']}; {ANOTHER}") from None

    def fill(self, network: nn.Module, assign: bool = False) -> None:
        """Load the weights. UserError where they are not those of the network that the metadata describes."""
        try:
            network.load_state_dict(self.weights, assign=assign)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.path}: not the weights of the model in its metadata: {reason}; {ANOTHER}") from None


def write(run: Path, step: int, weights: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Publish snapshots/STEP.safetensors (mode 0644) by rename. Its metadata holds a hash of all that it contains."""
    from safetensors.torch import save_file

    path = run / "snapshots" / f"{step:08d}.safetensors"
    remove_leftovers(path.parent)
    known = origin.of(run)
    config = {**metadata, "step": step} | ({"origin": known} if known else {})
    config["sha256"] = _sha256(config, weights)
    with publish(path) as temporary:  # one key: safetensors writes several in any order
        save_file(weights, temporary, metadata={"config": json.dumps(config)})
    return path


def _sha256(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """A hash of the configuration and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(config).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def steps(run: Path) -> list[int]:
    found = (step_of(path.stem) for path in (run / "snapshots").glob("*.safetensors"))
    return sorted(step for step in found if step is not None)


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
    """The snapshot of `step`, or the newest. UserError where the run has none, or it is damaged.

    A snapshot of an earlier version has no hash: of its weights only what the format tells is checked.
    """
    from safetensors import SafetensorError, safe_open

    path = run / "snapshots" / f"{find(run, step):08d}.safetensors"
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        probe(path)
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if not isinstance(metadata, dict) or type(metadata["step"]) is not int or not isinstance(metadata["kind"], str):
            raise ValueError("its metadata is not that of a snapshot")
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a snapshot of this stack ({error}); {ANOTHER}") from None
    known = metadata.pop("sha256", None)
    if known is not None and known != _sha256(metadata, weights):
        raise UserError(f"{path}: damaged, its hash is another than when it was written; {ANOTHER}")
    return Snapshot(path, metadata["step"], Metadata(path, metadata), weights)
