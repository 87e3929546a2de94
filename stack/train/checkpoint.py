"""Checkpoints that a kill cannot spoil, readable at any world size and ZeRO stage.

    checkpoints/STEP.tmp/   each rank writes rank-RRRRR.safetensors, fsyncs and reports its size and hash
    COMPLETE                written by rank 0 after all have reported; then STEP.tmp is renamed to STEP
    latest                  replaced by rename; for people, resume looks for the newest STEP that verifies

A rank's file holds, for each range of a parameter that the rank owns, the fp32 master weights, the optimizer's
moments and the EMA, under `NAME:START:STOP/KIND`. Loading reads the ranges it needs from whichever files have them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from stack import dist
from stack.config import Config, UserError
from stack.files import publish
from stack.log import say
from stack.parallel.ema import Ema
from stack.parallel.engine import Engine, Range, moments
from stack.train.schedule import Span

FORMAT = 1


class CheckpointConfig(Config):
    every: Span = 500
    keep: PositiveInt = 2
    """The newest ones kept."""
    keep_every: Span | None = None
    """Also kept: those whose step is a multiple of this."""


def _flats(engine: Engine, ema: Ema, owned_only: bool) -> Iterator[tuple[str, Range, Tensor]]:
    """(kind, range, its elements) of everything that this rank holds; the elements are views to read or write."""
    for partition in engine.partitions:
        if partition.owned or not owned_only:
            for kind, flat in {"master": partition.master, **moments(engine, partition)}.items():
                for r in partition.ranges:
                    yield kind, r, r.of(flat)
    for partition, shadow in ema.pairs:
        for r in partition.ranges:
            yield "ema", r, r.of(shadow)


def _optimizer_step(engine: Engine) -> float:
    steps = [float(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0.0


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run folder. `save` and `load` are collectives."""

    def __init__(self, run: Path, config: CheckpointConfig, keep_every: int = 0):
        self.folder = run / "checkpoints"
        self._keep = config.keep
        self._keep_every = keep_every

    def save(self, step: int, engine: Engine, ema: Ema, state: dict[str, Any]) -> bool:
        """Write checkpoint `step` with the JSON-able `state`. A failure is reported and leaves older ones as they are.

        Returns whether it was published.
        """
        from safetensors.torch import save as serialize

        final, temporary = self.folder / f"{step:08d}", self.folder / f"{step:08d}.tmp"
        if dist.rank() == 0:
            self._sweep()
        dist.barrier()
        name = f"rank-{dist.rank():05d}.safetensors"
        problem, report = "", None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{r.name}:{r.start}:{r.stop}/{kind}": piece.cpu().clone()
                for kind, r, piece in _flats(engine, ema, owned_only=True)
            }
            data = serialize(tensors)
            _write(temporary / name, data)
            report = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        except Exception as error:  # whatever it is: the other ranks wait to be told
            problem = f"{type(error).__name__}: {error}"
        reports = dist.all_gather(report)
        if dist.rank() == 0 and all(reports):
            try:
                complete = {"format": FORMAT, "step": step, "files": reports, **state}
                complete["optimizer_step"] = _optimizer_step(engine)
                _write(temporary / "COMPLETE", json.dumps(complete, indent=1).encode())
                _fsync(temporary)
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _fsync(self.folder)
            except OSError as error:
                problem = str(error)
        problems = [p for p in dist.all_gather(problem) if p]
        if problems:
            say(f"checkpoint {step} failed ({problems[0]}); training goes on, older checkpoints are untouched")
        if dist.rank() == 0:
            self._sweep()
            if not problems:
                self._retire(step)
        return not problems

    def _steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit()) if self.folder.exists() else []

    def _sweep(self) -> None:
        """Remove what a kill or a full disk left half written."""
        for path in self.folder.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _retire(self, newest: int) -> None:
        """Point `latest` at the newest; remove what need not be kept, and what failed to verify."""
        try:
            with publish(self.folder / "latest") as latest:
                latest.write_text(f"{newest:08d}\n")
        except OSError as error:
            say(f"{self.folder / 'latest'} cannot be written: {error}")
        steps = self._steps()
        for step in steps:
            kept = step in [s for s in steps if s <= newest][-self._keep :]
            if step > newest or not (kept or (self._keep_every and step % self._keep_every == 0)):
                shutil.rmtree(self.folder / f"{step:08d}", ignore_errors=True)

    def newest(self) -> dict[str, Any] | None:
        """The COMPLETE record of the newest checkpoint that verifies, on rank 0's word; None if there is none."""
        found = None
        if dist.rank() == 0:
            for step in reversed(self._steps()):
                found, problem = self._verify(self.folder / f"{step:08d}")
                if found is not None:
                    break
                say(f"checkpoint {step} does not verify ({problem}): passed over")
        return dist.broadcast(found)

    def _verify(self, folder: Path) -> tuple[dict[str, Any] | None, str]:
        try:
            record = json.loads((folder / "COMPLETE").read_text())
            if (record["format"], record["step"]) != (FORMAT, int(folder.name)):
                return None, f"format {record['format']} of step {record['step']}, this version reads {FORMAT}"
            for file in record["files"]:
                path = folder / file["name"]
                if not path.exists() or path.stat().st_size != file["size"]:
                    return None, f"{file['name']} is missing or has another size"
                if _sha256(path) != file["sha256"]:
                    return None, f"{file['name']} has another hash"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"COMPLETE cannot be read: {error}"
        return record, ""

    def load(self, record: dict[str, Any], engine: Engine, ema: Ema) -> None:
        """Fill the engine's partitions and the EMA from the checkpoint that `record` (of `newest`) describes.

        The run may have another world size, ZeRO stage or engine than the one that wrote it.
        Raises UserError where a parameter is missing: the model is another one.
        """
        folder = self.folder / f"{record['step']:08d}"
        with _Pieces([folder / file["name"] for file in record["files"]]) as pieces, torch.no_grad():
            for kind, r, target in _flats(engine, ema, owned_only=False):
                pieces.read(kind, r, target)
            for partition in engine.partitions:
                engine.optimizer.state[partition.key]["step"].fill_(record["optimizer_step"])
        engine.refresh()


class _Piece(NamedTuple):
    start: int
    stop: int
    file: Any
    key: str


class _Pieces:
    """The ranges that lie in a checkpoint's files, by parameter and kind."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)

    def __enter__(self) -> _Pieces:
        from safetensors import safe_open

        for path in self._paths:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                place, _, kind = key.rpartition("/")
                name, start, stop = place.rsplit(":", 2)
                self._pieces[name, kind].append(_Piece(int(start), int(stop), file, key))
        return self

    def __exit__(self, *exception: object) -> None:
        self._pieces.clear()

    def read(self, kind: str, r: Range, target: Tensor) -> None:
        """Copy elements r.start…r.stop of parameter r.name into `target`."""
        filled = 0
        for piece in self._pieces[r.name, kind]:
            start, stop = max(piece.start, r.start), min(piece.stop, r.stop)
            if start < stop:
                part = piece.file.get_slice(piece.key)[start - piece.start : stop - piece.start]
                target[start - r.start : stop - r.start].copy_(part)
                filled += stop - start
        if filled != r.stop - r.start:
            raise UserError(
                f"the checkpoint holds {filled} of the {r.stop - r.start} elements {r.start}:{r.stop} of {r.name} "
                f"({kind}): it was written for another model; give run.dir a new folder"
            )
