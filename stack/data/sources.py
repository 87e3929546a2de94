"""Which shards a source means: a folder, a .tar, a glob, a brace list, or a URL of one."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from stack.config import UserError, is_users
from stack.data import remote, safety
from stack.data.index import without_query
from stack.data.remote import is_compressed, is_remote
from stack.shown import redact

_MAX_PATTERNS = 10**6  # that braces may expand to
_SHOWN = 5  # files that a message names


class Found(NamedTuple):
    """Paths or URLs, sorted. compressed: archives that cannot be read by offset, and are passed over."""

    shards: list[str]
    compressed: list[str]


def find_shards(source: str | Path) -> list[str]:
    """The shards of `find`."""
    return find(source).shards


def find(source: str | Path) -> Found:
    """The tars that `source` means, and the compressed archives among them.

    `source` is a folder of *.tar, one tar, a glob or a brace list ("train/{00000..00007}.tar", "{a,b}.tar"), local or
    under any URL that fsspec knows. Raises UserError where there is none.
    """
    text = str(source)
    safety.check_source(text)
    text = text.removeprefix("file://")
    found: set[str] = set()
    for pattern in [text] if os.path.exists(text) else _expand_braces(text):
        found.update(remote.list_shards(pattern, compressed=True) if is_remote(pattern) else _local_shards(pattern))
    compressed = sorted(filter(is_compressed, found))
    if len(compressed) == len(found):
        raise UserError(f"{redact(text)}: no plain .tar, but {describe_compressed(compressed)}")
    return Found(sorted(found.difference(compressed)), compressed)


def describe_compressed(urls: Sequence[str]) -> str:
    """A phrase that names compressed archives, and the remedy."""
    names = [without_query(url).rpartition("/")[2] for url in urls]
    listed = ", ".join([*names[:_SHOWN], *("…" for _ in range(len(names) > _SHOWN))])
    plural = "s are" if len(names) > 1 else " is"
    return f"{len(names):,} compressed archive{plural} not read ({listed}): unpack to plain .tar files"


def _local_shards(pattern: str) -> list[str]:
    _refuse_passing_error(pattern)
    if os.path.isdir(pattern):
        names = os.listdir(pattern)
        kept = [name for name in names if (name.endswith(".tar") and name[0] != ".") or is_compressed(name)]
        found = [os.path.join(pattern, name) for name in kept]
    else:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
    if not found:
        problem = "no *.tar in this folder" if os.path.isdir(pattern) else "no such folder or shard"
        raise UserError(f"{pattern}: {problem}")
    return found


def _refuse_passing_error(pattern: str) -> None:
    """Raise what `os.path` and `glob` would take for a missing file, where it may pass (EIO, ESTALE)."""
    plain = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    path = pattern if plain == pattern else plain.rpartition("/")[0] or "."
    try:
        if S_ISDIR(os.stat(path).st_mode):
            os.scandir(path).close()
    except OSError as error:
        if not is_users(error):
            raise


def _expand_braces(text: str) -> list[str]:
    """Raises UserError above `_MAX_PATTERNS`, before they fill the memory."""
    too_many = UserError(f"{redact(text)}: these braces mean more than {_MAX_PATTERNS:,} shards")
    if math.prod(len(_parts(match)) for match in _BRACES.finditer(text)) > _MAX_PATTERNS:
        raise too_many
    found: list[str] = []
    waiting = [text]
    while waiting:
        pattern = waiting.pop()
        match = _BRACES.search(pattern)
        if match is None:
            found.append(pattern)
            continue
        parts = _parts(match)
        if not parts:
            raise UserError(f"{redact(text)}: {match[0]} counts backwards")
        if len(found) + len(waiting) + len(parts) > _MAX_PATTERNS:  # of braces inside others
            raise too_many
        before, after, width = pattern[: match.start()], pattern[match.end() :], len(match[1] or "")
        waiting += [f"{before}{str(part).zfill(width)}{after}" for part in reversed(parts)]
    return found


_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def _parts(match: re.Match[str]) -> Sequence[object]:
    first, last, names = match.groups()
    return names.split(",") if names is not None else range(int(first), int(last) + 1)
