"""The training that the files of a run folder are of.

A training's origin is a fingerprint of what its weights and previews depend on: configuration, data, encoders and
code. A restart and another folder leave it as it is. It is stored in RUN/origin.json and in each snapshot, and
evaluators copy it into their results. What another training has left in the folder is moved to RUN/earlier/NUMBER/.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from stack import config as configuration
from stack import dist
from stack.config import Config
from stack.data.dataset import weights_of
from stack.files import publish
from stack.log import say

_SECTIONS = ("objective", "data", "compute", "optim", "schedule", "parallel", "ema")
_PLACES: dict[str, set[str]] = {  # keys that name where something is, and not what it is
    "data": {"path", "source", "index", "cache", "workers", "max_rejected"},
    "objective": {"autoencoder"},
    "text": {"t5", "clip_l", "clip_g"},
}
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_RECORDS = ("metrics.jsonl", "keys.jsonl", "wandb.json")


def fingerprint(config: Config, data: str, encoders: Mapping[str, str] | None) -> str:
    """The origin of the training that `config` (a `TrainConfig`) describes.

    data, encoders: fingerprints of the shards, the autoencoder and the text encoders, whose paths do not matter.
    """
    values = configuration.public(config)
    mixture = values["data"].get("path") or values["data"].get("source")
    found = {name: _without_places(name, values[name]) for name in _SECTIONS}
    if "text" in found["objective"]:
        found["objective"]["text"] = _without_places("text", found["objective"]["text"])
    return configuration.fingerprint_of(
        found
        | {"seed": values["run"]["seed"], "weights": list(weights_of(mixture).values())}
        | {"shards": data, "encoders": encoders, "init": [_signature(Path(path)) for path in values["init"].values()]}
        | {"code": _code()}
    )[:16]


def _without_places(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _PLACES.get(section, ())}


def _signature(path: Path) -> list[list[Any]]:
    """Name, size and time of the files at `path`: initial weights can be too large to hash."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] * path.exists()  # a run that resumes needs none
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@cache
def _code() -> str:
    """sha256 of the sources that a training depends on."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in ("stack", "autoencoders") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def of(run: Path) -> str | None:
    """The origin of the training in the folder `run`. None if there is none, or an older version began it."""
    try:
        return str(json.loads((run / "origin.json").read_text(encoding="utf-8"))["origin"])
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None


def of_snapshot(path: Path) -> str | None:
    """The origin of the training that wrote the snapshot `path`, from its header. None if there is no such file, it is
    damaged, or an older version wrote it."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER)))
        origin = json.loads(header["__metadata__"]["config"])["origin"]
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return origin if isinstance(origin, str) else None


@contextmanager
def beginning(run: Path, start: int, origin: Callable[[], str]) -> Iterator[None]:
    """Make `run` the folder of the training with this origin, which goes on after step `start`. Rank 0 does it.

    Moves aside what another training has left for later steps: the newest snapshot would be one of them, and an
    evaluator would take their results for those of the steps to come. The same training makes the same files again.
    The caller writes config.yaml inside, so that whoever finds this origin finds its configuration.
    """
    if dist.rank() != 0:
        yield
        return
    found = origin()
    if of(run) != found:
        _move_aside(run, start)
    yield
    with publish(run / "origin.json") as temporary:
        temporary.write_text(json.dumps({"origin": found}), encoding="utf-8")


def _move_aside(run: Path, start: int) -> None:
    (run / "origin.json").unlink(missing_ok=True)
    records = [path for name in _RECORDS if not start and (path := run / name).is_file()]
    began = any(path.name == "metrics.jsonl" for path in records)
    numbers = [int(path.name) for path in (run / "earlier").glob("*") if path.name.isdecimal()]
    aside, results, moved = run / "earlier" / str(max(numbers, default=0) + 1), run / "eval.jsonl", False
    # Snapshots before results: an evaluator that finds its snapshot gone lets its result follow.
    for folder, pattern in (("snapshots", "*.safetensors"), ("samples", "*.png"), ("eval", "*")):
        for path in (run / folder).glob(pattern):
            if _step(path) > start:
                _move(path, aside / folder / path.name)
                moved = True
    if results.is_file() and (moved or began):
        lines = results.read_bytes().splitlines(keepends=True)
        aside.mkdir(parents=True, exist_ok=True)
        (aside / results.name).write_bytes(b"".join(lines))
        with publish(results) as temporary:
            temporary.write_bytes(b"".join(line for line in lines if _step_of_line(line) <= start))
    for path in records if moved or began else ():
        _move(path, aside / path.name)
    if began and (run / "config.yaml").is_file():
        shutil.copy2(run / "config.yaml", aside / "config.yaml")  # evaluators wait for one, and find one at any time
    if moved or began:
        say(f"{run}: what another training left here of steps after {start} was moved to {aside}")


def _move(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, place)


def _step(path: Path) -> int:
    """The step in the name of a snapshot, sample sheet or folder of results; -1 for any other file."""
    number = path.name.partition(".")[0]
    return int(number) if number.isdecimal() and number.isascii() else -1


def _step_of_line(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
