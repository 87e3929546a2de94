"""Checkpoints that a kill cannot spoil, readable at any world size and ZeRO stage, and written beside the training.

    checkpoints/STEP.tmp/   each rank writes rank-RRRRR.safetensors, fsyncs and reports its size and hash
    COMPLETE                written by rank 0 after all have reported; then STEP.tmp is renamed to STEP
    latest                  replaced by rename; for people, resume looks for the newest STEP that verifies

A rank's file holds, for each range of a parameter that the rank owns, the fp32 master weights, the optimizer's
moments and the EMA, under `NAME:START:STOP/KIND`. Loading reads the ranges it needs from whichever files have them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from stack import dist
from stack.config import Config, UserError
from stack.files import publish
from stack.lines import backwards
from stack.log import say
from stack.parallel.ema import Ema
from stack.parallel.engine import Engine, Range, moments
from stack.train.schedule import Span, step_of

FORMAT = 1
T = TypeVar("T")


class CheckpointConfig(Config):
    every: Span = 500
    keep: PositiveInt = 2
    """The newest ones kept."""
    keep_every: Span | None = None
    """Also kept: those whose step is a multiple of this."""


class _File(BaseModel):
    name: str
    size: int
    sha256: str


class Record(BaseModel):
    """What COMPLETE must hold. It may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: int
    step: NonNegativeInt
    optimizer_step: float
    files: list[_File]


class _Flat(NamedTuple):
    """A flat tensor of this rank's state, and the ranges of parameters that lie in it."""

    kind: str
    ranges: list[Range]
    tensor: Tensor


def _flats(engine: Engine, ema: Ema, owned_only: bool) -> Iterator[_Flat]:
    for partition in engine.partitions:
        if partition.owned or not owned_only:
            for kind, tensor in {"master": partition.master, **moments(engine, partition)}.items():
                yield _Flat(kind, partition.ranges, tensor)
    for partition, shadow in ema.pairs:
        yield _Flat("ema", partition.ranges, shadow)


def _optimizer_step(engine: Engine) -> float:
    steps = [float(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0.0


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, Any]:
    """Write and fsync a file of `parts`; its entry in COMPLETE, hashed on the way."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _safetensors(flats: Sequence[_Flat]) -> list[bytes | memoryview]:
    """The parts of a safetensors file of all ranges, which are views and not copies of the flat tensors."""
    header: dict[str, Any] = {}
    parts: list[bytes | memoryview] = []
    offset = 0
    for kind, ranges, tensor in flats:
        for r in ranges:
            part = r.of(tensor).numpy().data.cast("B")
            place = {"dtype": "F32", "shape": [r.stop - r.start], "data_offsets": [offset, offset + len(part)]}
            header[f"{r.name}:{r.start}:{r.stop}/{kind}"] = place
            parts.append(part)
            offset += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *parts]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run folder; all methods are collectives.

    A save runs in a thread: the copy into host memory beside the next forward and backward pass, which change nothing
    of what is saved, then writing, hashing, fsync and publication. Training waits only where its next update comes
    before the copy's end (`settle`), or a save before the end of the one before. The host memory is kept for the next
    copy: 16 bytes a parameter, divided by the ranks, and up to twice that on a GPU, where PyTorch rounds it up.
    """

    newest_step: int | None = None
    """The step of the newest checkpoint that this run can resume from, as far as this process has seen."""

    def __init__(self, run: Path, config: CheckpointConfig, keep_every: int = 0):
        self.folder = run / "checkpoints"
        self._damaged: set[int] = set()  # what `newest` has passed over
        self._keep = config.keep
        self._keep_every = keep_every
        self._copies: list[_Flat] = []
        self._group = dist.side_group()  # the threads' own, since the training goes on using the other one
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._published = False
        self._broken: Exception | None = None

    def check_space(self, engine: Engine, ema: Ema) -> None:
        """UserError where the disk has no room for one checkpoint, without what a kill left of another."""
        needed = sum(dist.all_gather(_num_bytes(_flats(engine, ema, owned_only=True))))
        if problem := _on_rank_0(partial(self._no_space, needed)):
            raise UserError(f"{problem}: free some, or give run.dir another disk")

    def _no_space(self, needed: int) -> str:
        """Why a checkpoint has no room, where what a kill or a failed save left of others is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if free >= needed:
            return ""
        return f"{self.folder}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} are free"

    def save(self, step: int, engine: Engine, ema: Ema, state: dict[str, Any]) -> None:
        """Write checkpoint `step`, with the JSON-able `state`, beside the training, which calls `settle` before it next
        changes weights, moments or average.

        A write that fails on some rank is reported and leaves older ones as they are.
        """
        self.wait()
        flats = list(_flats(engine, ema, owned_only=True))
        if not self._copies:
            pinned = dist.device().type == "cuda"
            self._copies = [flat._replace(tensor=torch.empty(flat.tensor.shape, pin_memory=pinned)) for flat in flats]
        record = {"format": FORMAT, "step": step, **state, "optimizer_step": _optimizer_step(engine)}
        updated = torch.cuda.current_stream().record_event() if dist.device().type == "cuda" else None
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(flats, updated, step, record), daemon=True)
        self._thread.start()

    def save_now(self, step: int, engine: Engine, ema: Ema, state: dict[str, Any]) -> str:
        """As `save`, until the checkpoint is published. The problem, the same on all ranks."""
        self.save(step, engine, ema, state)
        return "" if self.wait() else f"checkpoint {step} could not be saved"

    def settle(self) -> None:
        """Until nothing of the state is read any more. Raises RuntimeError as `wait` does."""
        if self._thread is not None:
            self._copied.wait()
            self._check()

    def wait(self) -> bool:
        """Until the save in flight has ended. Whether the last one was published.

        Raises RuntimeError where the ranks' threads no longer agree on what they do: the run has to start again.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()
        return self._published

    def _check(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"a checkpoint broke off: {self._broken}") from self._broken

    def _run(self, flats: list[_Flat], updated: Any, step: int, record: dict[str, Any]) -> None:
        self._published = False
        try:
            try:
                self._copy(flats, updated)
            finally:
                self._copied.set()
            problem = self._publish(step, record)
        except Exception as error:  # beyond what `_publish` shares with the other ranks, or one of them is gone
            self._broken = error
            return
        self._published = not problem
        if problem:
            say(f"checkpoint {step} failed ({problem}); training goes on, older checkpoints are untouched")

    @torch.no_grad()
    def _copy(self, flats: list[_Flat], updated: Any) -> None:
        """updated: on a GPU, the event after which the state is that of the step."""
        if updated is None:
            for copy, flat in zip(self._copies, flats, strict=True):
                copy.tensor.copy_(flat.tensor)
            return
        with torch.cuda.device(dist.device()), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(updated)
            for copy, flat in zip(self._copies, flats, strict=True):
                copy.tensor.copy_(flat.tensor, non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def _publish(self, step: int, record: dict[str, Any]) -> str:
        """What went wrong on the first rank where something did."""
        final, temporary = self.folder / f"{step:08d}", self.folder / f"{step:08d}.tmp"
        needed = sum(dist.all_gather(_num_bytes(self._copies), self._group))
        problem, report = "", None
        if dist.rank() == 0:
            try:
                problem = self._no_space(needed)
            except Exception as error:
                problem = str(error)
        if any(problems := dist.all_gather(problem, self._group)):
            return problems[0]
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            report = _write(temporary / f"rank-{dist.rank():05d}.safetensors", _safetensors(self._copies))
        except Exception as error:  # whatever it is: the other ranks wait to be told
            problem = f"{type(error).__name__}: {error}"
        reports = dist.all_gather(report, self._group)
        if dist.rank() == 0 and all(reports):
            try:
                _write(temporary / "COMPLETE", [json.dumps({**record, "files": reports}, indent=1).encode()])
                _fsync(temporary)
                if final.exists():  # damaged, or the disk failed after the rename of a save that is tried again
                    os.replace(final, self.folder / f"{final.name}.old.tmp")
                os.replace(temporary, final)
                _fsync(self.folder)
            except Exception as error:
                problem = str(error)
        problems = [p for p in dist.all_gather(problem, self._group) if p]
        if dist.rank() == 0:
            self._sweep()
            if not problems:
                self._retire(step)
        return problems[0] if problems else ""

    def _steps(self) -> list[int]:
        """The steps of all checkpoints there are, damaged ones too. OSError where the folder cannot be listed."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            if self.folder.is_symlink():
                raise OSError(f"{self.folder}: a link to a folder that is not there") from None
            names = []
        return sorted(step for step in map(step_of, names) if step is not None)

    def _sweep(self) -> None:
        """Remove what a kill or a full disk left half written."""
        for path in self.folder.glob("*.tmp"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()

    def _retire(self, newest: int) -> None:
        """Point `latest` at the newest; remove the checkpoints before it that need not be kept.

        One of a later step, which the training has passed over, is removed only if its folder has no COMPLETE.
        """
        self.newest_step = newest
        self._damaged.discard(newest)
        try:
            with publish(self.folder / "latest") as latest:
                latest.write_text(f"{newest:08d}\n", encoding="utf-8")
            steps = self._steps()
            kept = [step for step in steps if step <= newest and step not in self._damaged][-self._keep :]
            for step in steps:
                folder = self.folder / f"{step:08d}"
                if step > newest:
                    needed = not _is_incomplete(folder)
                else:
                    periodic = bool(self._keep_every) and step % self._keep_every == 0
                    needed = step in kept or (periodic and step not in self._damaged)
                if not needed:
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            say(f"{self.folder}: old checkpoints stay, or `latest` does ({error})")

    def newest(self, schema: type[Record] = Record) -> dict[str, Any] | None:
        """The COMPLETE record, of at least what `schema` asks for, of the newest checkpoint. None if there is none.

        A checkpoint is passed over only if it is proved incomplete or damaged. Rank 0 finds out which are there, and
        each rank hashes its share of the files.
        Raises the same OSError on all ranks where a checkpoint cannot be read or none can be used.
        """
        try:
            return self._newest(schema)
        except OSError as error:
            raise OSError(
                f"{error}. Nothing is changed: start again when the checkpoints can be read. To start over, give "
                f"run.dir a new folder or remove {self.folder}"
            ) from None

    def _newest(self, schema: type[Record]) -> dict[str, Any] | None:
        steps = _on_rank_0(self._steps)
        for step in reversed(steps):
            folder = self.folder / f"{step:08d}"
            record, problem = _on_rank_0(partial(_read_record, folder, schema))
            if record is not None:
                files = record["files"][dist.rank() :: dist.world_size()]
                problems = _on_all(partial(_damage, folder, files))
                problem = next(filter(None, problems), "")
            if not problem:
                self.newest_step = step
                return record
            self._damaged.add(step)
            say(f"checkpoint {step} does not verify ({problem}): passed over")
        if steps:
            raise OSError(f"{self.folder}: none of its checkpoints can be used (steps {', '.join(map(str, steps))})")
        if known := _on_rank_0(self._vanished):
            raise OSError(f"{self.folder} is empty, but had a checkpoint of step {known}")
        return None

    def _vanished(self) -> int | None:
        """The step of a checkpoint that the run's metrics name, if the folder exists but is empty, like a mount point
        without its file system."""
        lines = itertools.islice(backwards(self.folder.parent / "metrics.jsonl"), 100)
        steps = [line["checkpoint"] for _, line in lines if line.get("checkpoint")]
        return steps[0] if steps and self.folder.exists() else None

    def load(self, record: dict[str, Any], engine: Engine, ema: Ema) -> None:
        """Fill the engine's partitions and the EMA from the checkpoint that `record` (of `newest`) describes.

        The run may have another world size, ZeRO stage or engine than the one that wrote it.
        Raises UserError where a parameter is missing: the model is another one.
        """
        folder = self.folder / f"{record['step']:08d}"
        with _Pieces([folder / file["name"] for file in record["files"]]) as pieces, torch.no_grad():
            for kind, ranges, tensor in _flats(engine, ema, owned_only=False):
                for r in ranges:
                    pieces.read(kind, r, r.of(tensor))
            for partition in engine.partitions:
                engine.optimizer.state[partition.key]["step"].fill_(record["optimizer_step"])
        engine.refresh()


def _num_bytes(flats: Iterable[_Flat]) -> int:
    return sum(flat.tensor.nbytes for flat in flats)


def _on_all(call: Callable[[], T]) -> list[T]:
    """The results of all ranks. An OSError of one is raised on all, so that none waits for another."""
    result: T | OSError
    try:
        result = call()
    except OSError as error:
        result = error
    results = dist.all_gather(result)
    for result in results:
        if isinstance(result, OSError):
            raise result
    return results


def _on_rank_0(call: Callable[[], T]) -> T:
    """Rank 0's result on every rank, see `_on_all`."""
    return _on_all(lambda: call() if dist.rank() == 0 else None)[0]  # type: ignore[return-value]


def _is_incomplete(folder: Path) -> bool:
    """Whether the folder can be listed and has no COMPLETE."""
    return folder.is_dir() and "COMPLETE" not in os.listdir(folder)


def _read_record(folder: Path, schema: type[Record] = Record) -> tuple[dict[str, Any] | None, str]:
    """COMPLETE, or how it is damaged. OSError where that cannot be found out."""
    try:
        record = json.loads((folder / "COMPLETE").read_bytes())
        checked = schema.model_validate(record)
    except (IsADirectoryError, NotADirectoryError) as error:
        return None, f"COMPLETE is no file: {error}"
    except FileNotFoundError:
        if not _is_incomplete(folder):
            raise
        return None, "it has no COMPLETE"
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"COMPLETE is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        return None, f"COMPLETE is damaged: {error}"
    if (checked.format, checked.step) != (FORMAT, int(folder.name)):
        return None, f"format {checked.format} of step {checked.step}, this version reads {FORMAT}"
    return record, ""


def _damage(folder: Path, files: list[dict[str, Any]]) -> str:
    """How the first file that is not as COMPLETE describes it differs. OSError where a file cannot be read."""
    for file in files:
        path = folder / Path(file["name"]).name
        try:
            if path.stat().st_size != file["size"]:
                return f"{path.name} has another size"
            if _sha256(path) != file["sha256"]:
                return f"{path.name} has another hash"
        except (IsADirectoryError, NotADirectoryError) as error:
            return f"{path.name} is no file: {error}"
        except FileNotFoundError:
            if path.name in os.listdir(folder):
                raise
            return f"{path.name} is missing"
    return ""


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
