"""The training that the files of a run folder are of.

A training's origin is a fingerprint of what its weights and previews depend on: configuration, data, encoders and
code. A restart and another folder leave it as it is. It is stored in RUN/origin.json and in each snapshot, and
evaluators copy it into their results. What another training has left in the folder is moved to RUN/earlier/NUMBER/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stack.files import publish
from stack.log import say

_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_RECORDS = ("metrics.jsonl", "keys.jsonl", "wandb.json")


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
def beginning(run: Path, start: int, origin: str) -> Iterator[None]:
    """Make `run` the folder of the training with this origin, which goes on after step `start`. For rank 0.

    Moves aside what another training has left for later steps: the newest snapshot would be one of them, and an
    evaluator would take their results for those of the steps to come. The same training makes the same files again.
    The caller writes config.yaml inside, so that whoever finds this origin finds its configuration.
    """
    if of(run) != origin:
        _move_aside(run, start)
    yield
    with publish(run / "origin.json") as temporary:
        temporary.write_text(json.dumps({"origin": origin}), encoding="utf-8")


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
