"""The identity of a training's data: what its batches are made of, wherever it is stored and whatever it is called."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from stack.config import Config
from stack.shown import printable

_MAX_NAMED = 5  # shards that a message names of each kind


class Part(Config):
    """The shards of one source, in the order in which the batch plan counts them."""

    role: Literal["train", "paired"]
    """paired: second images, which are found by their keys."""
    weight: float | None
    """The weight of this source in a mixture; None without one."""
    names: list[str]
    """File names. They are for messages only."""
    contents: list[str]
    """`ShardIndex.identity` of each shard."""


class DataIdentity(Config):
    parts: list[Part]
    facts: dict[str, Any]
    """What else decides the batches: the settings of pre-encoded data that the manifest contains."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything but the names: it covers the order, the weights and the content of the shards."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for part in self.parts:
            digest.update(json.dumps([part.role, part.weight, len(part.contents)]).encode())
            digest.update("".join(part.contents).encode())
        return digest.hexdigest()

    def difference(self, before: DataIdentity) -> str:
        """What is different from `before`, for a message: names of shards, or what else it is."""
        old, new = before._shards(), self._shards()
        missing, added = _without(old, new), _without(new, old)
        kinds = {"changed": missing & added, "added": added - missing, "missing": missing - added}
        listed = [f"{kind}: {_listed(sorted(names))}" for kind, names in kinds.items() if names]
        listed += [f"{key} differs" for key in self.facts if self.facts[key] != before.facts.get(key)]
        return "; ".join(listed) or "the same shards in another order, number or mixture"

    def _shards(self) -> list[tuple[str, str]]:
        return [pair for part in self.parts for pair in zip(part.names, part.contents, strict=True)]


def _without(shards: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> set[str]:
    """Names of the shards whose content is not among those of `others`, or more often than there."""
    left = Counter(content for _, content in others)
    names = set()
    for name, content in shards:
        left[content] -= 1
        if left[content] < 0:
            names.add(name)
    return names


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(printable, names[:_MAX_NAMED])) + more
