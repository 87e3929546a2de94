"""Which run a folder's checkpoints are of: its settings, data, encoders and first weights.

Inputs are compared by their content and never by their paths: a checkpoint contains their fingerprints, and data.json
in the run's folder lists the shards behind the fingerprint of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import Accept
from stack.data.identity import DataIdentity
from stack.files import publish
from stack.log import say
from stack.text.encoders import NAMES
from stack.train.recipe import TrainConfig

# What makes a run the same run: keys that a resumed one may change are left out.
_FREE: dict[str, set[str]] = {
    "data": {"workers", "index", "cache", "max_rejected"},
    "objective": {"preview"},
    "schedule": set(),
    "optim": set(),
    "ema": set(),
}
_PLACES = ("data.path", "data.source", "data.paired", "objective.autoencoder", "init.from")
"""Keys that name where an input is stored. `objective.text` has further ones, one for each encoder."""


def check_settings(run: Path, config: TrainConfig, state: dict[str, Any] | None) -> None:
    """UserError where the folder's checkpoints are those of another model, schedule or initialization.

    state: the record of the checkpoint to resume from. If it has no fingerprint of its data, which older versions did
    not keep, the paths of all inputs have to be the same.
    """
    problem, path = "", run / "config.yaml"
    if dist.rank() == 0 and path.exists() and any((run / "checkpoints").glob("*/COMPLETE")):
        by_content = state is not None and "data" in state
        try:
            known = settings(configuration.load(TrainConfig, path), by_content)
            # As they are saved: without the secrets of URLs.
            saved = configuration.validate(TrainConfig, configuration.public(config), "values")
            asked = settings(saved, by_content)
            changed = [key for key in asked if known.get(key) != asked[key]]
            if changed:
                problem = (
                    f"{path} differs in {', '.join(changed)}: give run.dir a new folder, or restore the old values"
                )
        except UserError as error:
            problem = str(error)
    if problem := dist.broadcast(problem):
        raise UserError(problem)


def settings(config: TrainConfig, by_content: bool) -> dict[str, Any]:
    """Dotted key → value of all that makes a run the same run. by_content: without the paths of its inputs."""
    values = configuration.public(config)
    found = {
        f"{section}.{key}": value
        for section, free in _FREE.items()
        for key, value in values[section].items()
        if key not in free
    }
    found |= {"run.seed": values["run"]["seed"], "init.from": values["init"].get("from")}
    if by_content:
        found = {key: value for key, value in found.items() if key not in _PLACES}
        if text := found.get("objective.text"):
            found["objective.text"] = {key: value for key, value in text.items() if key not in NAMES}
    return found


def check_data(run: Path, config: TrainConfig, state: dict[str, Any] | None) -> Accept:
    """A check that the data of a resumed run are those of its checkpoint. It raises UserError where they are not.

    `run.accept_data` names the fingerprint of other data that the user has accepted.
    """

    def accept(now: DataIdentity) -> None:
        if state is None:
            return
        then, step = state.get("data"), state["step"]
        if then is None:
            say(f"{run}: the checkpoint of step {step} has no fingerprint of its data: they are not compared")
            return
        if then == now.fingerprint:
            return
        before = read(run)
        known = before is not None and before.fingerprint == then
        how = f" ({now.difference(before)})" if before is not None and known else ""
        problem = f"the data are not those of the checkpoint of step {step}{how}"
        if config.run.accept_data == now.fingerprint:
            say(f"{run}: {problem}; run.accept_data accepts them")
            return
        raise UserError(
            f"{run}: {problem}: their fingerprint was {then}, it is {now.fingerprint}: restore the data, give run.dir "
            f"a new folder, or resume with the other data: run.accept_data={now.fingerprint}"
        )

    return accept


def read(run: Path) -> DataIdentity | None:
    """The data of the run's checkpoints as data.json lists them; None where the file is missing or damaged."""
    try:
        return DataIdentity.model_validate_json((run / "data.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def write(run: Path, identity: DataIdentity) -> None:
    """Write data.json. For rank 0."""
    with publish(run / "data.json") as temporary:
        temporary.write_text(identity.model_dump_json(), encoding="utf-8")


def check_inputs(
    run: Path, config: TrainConfig, state: dict[str, Any] | None, encoders: dict[str, str] | None
) -> str | None:
    """The fingerprint of the weights that the run began with, None for drawn ones. A collective.

    Raises UserError where these, the autoencoder or a text encoder are other ones than when the run began. The weights
    of `init.from` may be gone: a resumed run does not read them.
    """
    path, found = config.init.get("from"), None
    if dist.rank() == 0 and path is not None and path.exists():
        found = fingerprint_of_weights(path)
    found = dist.broadcast(found)
    if state is None:
        return found
    before, now = state.get("encoders", encoders) or {}, encoders or {}
    if before != now:
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        how = "; ".join(f"the fingerprint of {name} was {before.get(name)}, it is {now.get(name)}" for name in names)
        problem = f"began with another autoencoder or text encoder than is there now: {how}"
        raise UserError(f"{run}: {problem}: restore it, or give run.dir a new folder")
    if "init" not in state:
        return found
    began = state["init"]
    if (began is None) != (path is None) or (found is not None and found != began):
        raise UserError(
            f"{run}: init.from={path} is not what the run began with: the fingerprint of its weights was {began}, it "
            f"is {found}: give run.dir a new folder, or restore the old value"
        )
    return began


def fingerprint_of_weights(path: Path) -> str:
    """sha256 of a file of weights, or of the names and contents of a folder's configuration and weights."""
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors")
    files = [folder] if folder.is_file() else sorted(file for file in folder.iterdir() if file.suffix in kinds)
    for file in files:
        if file != folder:
            digest.update(json.dumps(file.name).encode())
        with file.open("rb") as opened:
            while piece := opened.read(2**22):
                digest.update(piece)
    return digest.hexdigest()


def origin_of(config: TrainConfig, inputs: Mapping[str, Any]) -> str:
    """The origin (`stack.train.origin`) of the training that `config` describes.

    inputs: fingerprints of its data, encoders and first weights.
    """
    values = configuration.public(config)
    more = {"compute": values["compute"], "parallel": values["parallel"], "preview": values["objective"].get("preview")}
    described = settings(config, by_content=True) | more | {"inputs": inputs, "code": _code()}
    return configuration.fingerprint_of(described)[:16]


@cache
def _code() -> str:
    """sha256 of the sources that a training depends on."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in ("stack", "autoencoders") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
