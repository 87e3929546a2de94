"""How the workers of one job share its shards.

Each worker lists the output folder and the claims in it, takes what nobody has, and lists again when it meets another
worker. A shard costs five operations on the folder's file system at most, whatever the number of shards and workers:
claim it, look for its stats, check the claim before publishing, check and remove it. A finished one costs one: its
stats are read once.

While it works, a worker holds a claim with the settings of its job, `.worker.MARK.TOKEN`. It enters only if no living
worker has other settings and no finished shard has another mark.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from stack.claims import Claims, note_of
from stack.config import UserError
from stack.data.schema import MANIFEST, load_manifest
from stack.log import say
from stack.preencode.stats import Finished, finished, read_all, read_stats
from stack.preencode.writer import outputs
from stack.shown import redact

POLL_S = 1.0
_LISTING_SHARE = 0.05  # of a worker's time, at most, is spent on listing
_FEW = 64  # shards of which each is looked for, instead of listing the folder
_NAMED = 8  # other workers, or settings, that a message names
_CLAIMS, _WORKER = ".claims", ".worker."


class _Names(NamedTuple):
    """Names of a shard's files in the output folder, and of its claim."""

    tar: str
    index_file: str
    stats: str
    claim: str


def _names(target: Path) -> _Names:
    tar, index, stats = outputs(target)
    return _Names(tar.name, index.name, stats.name, target.stem)


class Share:
    """The shards of a job in the folder `out`, as one worker sees them.

    finished: number of the shard → what its stats tell.  left: numbers of the others.  existing: those of them with a
    file in the folder at the start.  `on_found(number)` is called for each shard that another worker has finished.

    Raises UserError for a folder with shards of another mark.
    """

    def __init__(self, out: Path, targets: list[Path], settings: dict[str, Any], mark: str) -> None:
        self.out, self.targets, self.settings, self.mark = out, targets, settings, mark
        self.finished: dict[int, Finished] = {}
        self.left = dict.fromkeys(range(len(targets)))  # ordered
        self.on_found: Callable[[int], None] = lambda number: None
        self._names = [_names(target) for target in targets]
        self._order: deque[int] = deque()
        self._listed_at, self._pause = 0.0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        self._read_finished(present := set(os.listdir(out)))
        self.existing = [number for number in self.left if self._names[number].tar in present]
        own = {names.stats for names in self._names}
        others = [out / name for name in sorted(present) if name.endswith("_stats.json") and name not in own]
        for path, stats in zip(others, read_all(others), strict=True):
            self._check_mark(path, stats)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Encode only within this block: this worker is then known to all others.

        Raises UserError where a living worker has other settings.
        """
        self._claims = Claims(self.out / _CLAIMS)
        with ExitStack() as self._presence:
            self._enter()
            yield

    def turns(self) -> Generator[int]:
        """Shards to encode, each claimed by this worker until the next one, until all are finished.

        The caller passes each to `done` once it is finished. Shards of other workers are waited for.
        """
        waiting = ""
        self._list()
        while self.left:
            number = self.following()
            if number is None:
                if not waiting and (waiting := self._others()):
                    say(f"{self.out}: waiting for shards of other workers: {waiting}")
                time.sleep(max(POLL_S, self._pause))
                self._list()
                continue
            self._order.popleft()
            with self._claims.hold(self._names[number].claim) as mine:
                if mine and not self._look(number):
                    yield number
                    continue
            # Another worker is here.
            if time.monotonic() - self._listed_at > self._pause:
                self._list()
            elif self._order:
                self._order.rotate(random.randrange(len(self._order)))

    def following(self) -> int | None:
        """The next shard that nobody had in hand at the last listing."""
        while self._order and self._order[0] not in self.left:
            self._order.popleft()
        return self._order[0] if self._order else None

    def may_publish(self, number: int) -> bool:
        """Whether shard `number` is still this worker's. If not, it was suspended so long that it was taken for dead.

        Raises UserError where workers with other settings came meanwhile.
        """
        if self._claims.owns(self._names[number].claim):
            return True
        self._enter()
        return False

    def done(self, number: int, stats: dict[str, Any]) -> None:
        """Take in what this worker has published."""
        result = finished(stats)
        assert result is not None
        del self.left[number]
        self.finished[number] = result

    def clean(self) -> None:
        """Remove what dead workers left, once all shards are finished."""
        claims = Claims(self.out / _CLAIMS)
        claims.bury()
        claims.sweep(self.out, {MANIFEST, "rejected.jsonl", *(n for names in self._names for n in names)})

    # ---- the folder

    def _list(self) -> None:
        """See which shards are finished by now, and put those that nobody has in hand in order.

        The first worker begins at the first shard, others begin far from those that they see.
        """
        began = time.monotonic()
        present = set(os.listdir(self.out)) if len(self.left) > _FEW else None
        self._read_finished(present)
        claimed = self._claims.names()
        free = [number for number in self.left if self._names[number].claim not in claimed]
        if self.left and not free:
            claimed = self._claims.held()  # without the dead
            free = [number for number in self.left if self._names[number].claim not in claimed]
        at = _far_from_others(free) if claimed and free else 0
        self._order = deque(free[at:] + free[:at])
        if leftovers := [name for name in present or () if name.endswith(".tmp")]:
            self._claims.sweep(self.out, {name for number in free for name in self._names[number]}, leftovers)
        self._listed_at = time.monotonic()
        self._pause = (self._listed_at - began) / _LISTING_SHARE

    def _read_finished(self, present: set[str] | None) -> None:
        """Take in the shards that were finished meanwhile. present: the names in the folder, if it was listed."""
        numbers = [
            number
            for number in self.left
            if present is None or (self._names[number].tar in present and self._names[number].stats in present)
        ]
        paths = [self.out / self._names[number].stats for number in numbers]
        for number, path, stats in zip(numbers, paths, read_all(paths), strict=True):
            self._take_in(number, path, stats, present is not None)

    def _look(self, number: int) -> bool:
        """Whether the shard is finished, by what is in the folder now."""
        path = self.out / self._names[number].stats
        return self._take_in(number, path, read_stats(path), False)

    def _take_in(self, number: int, path: Path, stats: dict[str, Any] | None, has_tar: bool) -> bool:
        self._check_mark(path, stats)
        result = None if stats is None else finished(stats)
        if result is None or not (has_tar or self.targets[number].exists()):
            return False
        del self.left[number]
        self.finished[number] = result
        self.on_found(number)
        return True

    # ---- the job's settings

    def _check_mark(self, path: Path, stats: dict[str, Any] | None) -> None:
        """UserError where the shard was made with other settings, which are named where they are known."""
        if stats is None or stats.get("mark") == self.mark:
            return
        made = "this shard was made from other sources, encoders or settings than this configuration names"
        workers = sorted((self.out / _CLAIMS).glob(f"{_WORKER}{str(stats.get('mark'))[:16]}.*"))
        theirs = note_of(workers[0]) if workers else _settings_of_manifest(self.out, self.settings)
        named = differences(theirs, self.settings)
        raise UserError(
            f"{path}: {made}{f' ({named})' if named else ''}: give `out` a new folder, or remove the old one"
        )

    def _enter(self) -> None:
        """Announce this worker, unless one with other settings works here. One worker at a time does so."""
        own = f"{_WORKER}{self.mark[:16]}."
        while True:
            with self._claims.hold(".entrance") as mine:
                if mine:
                    workers = [name for name in os.listdir(self.out / _CLAIMS) if name.startswith(_WORKER)]
                    if any(not name.startswith(own) for name in workers):
                        self._refuse_others(own)
                        self._claims.bury()  # so that none of theirs publishes, should it wake up
                    self._presence.enter_context(self._claims.hold(own + uuid.uuid4().hex, self.settings))
                    break
            time.sleep(random.uniform(0.02, 0.2))
        self._read_finished(set(os.listdir(self.out)))  # of workers that have left meanwhile

    def _refuse_others(self, own: str) -> None:
        for name, owner in self._claims.owners(_WORKER).items():
            if not name.startswith(own):
                theirs = {} if owner is None else owner.note
                named = differences(theirs, self.settings) or "unknown ones"
                raise UserError(
                    f"{self.out}: another worker ({owner or 'unknown'}) encodes into this folder with other settings "
                    f"({named}): give this job another folder, or stop the other worker"
                )

    def _others(self) -> str:
        claims = {self._names[number].claim for number in self.left}
        owners = [f"{name} ({owner or 'unknown'})" for name, owner in self._claims.owners().items() if name in claims]
        return ", ".join(owners[:_NAMED]) + (f" and {len(owners) - _NAMED:,} more" if len(owners) > _NAMED else "")


def _far_from_others(free: list[int]) -> int:
    """A place in the middle half of the longest run of consecutive numbers."""
    ends = [at for at in range(1, len(free)) if free[at] != free[at - 1] + 1]
    start, end = max(pairwise([0, *ends, len(free)]), key=lambda run: run[1] - run[0])
    quarter = (end - start) // 4
    return random.randrange(start + quarter, end - quarter)


def _settings_of_manifest(out: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """Our settings, in place of those that the manifest of a finished job contains."""
    try:
        manifest = load_manifest(out).model_dump(mode="json")
    except (UserError, OSError):
        return {}
    known = {name: manifest.get(name, ours[name]) for name in ours if name not in ("captions", "text")}
    return {**ours, **known, "text": {name: manifest.get(name, value) for name, value in ours["text"].items()}}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The settings in which two jobs differ, with both values; empty if theirs are not known."""
    if not theirs:
        return ""
    there, here = _flat(theirs), _flat(ours)
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    named = [f"{name} is {_shown(there.get(name))} there, {_shown(here.get(name))} here" for name in names[:_NAMED]]
    return "; ".join(named) + (f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = redact(repr(value))
    return text if len(text) <= 100 else text[:99] + "…"
