"""What the start of a training takes from the indices of many shards, as columns: one file per folder of indices.

A hundred thousand indices are not opened to plan an epoch, and memory holds no object for each. An index is opened when
a column of it is asked for.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from stack.data.index import FORMAT, NUM_LOWEST, ShardIndex
from stack.data.safety import max_pixels
from stack.files import publish

FILE = ".shards.safetensors"
_MAX_OPENED = 256  # indices of which columns may be mapped at once
_TEXTS = ("name", "version", "digest", "sha256", "identity")
_NUMBERS = ("size", "count", "rejected", "kind", "num_sizes", "damaged")

_PER_SHARD = (*_NUMBERS, "lowest")
_NO_HASH = 2**32

Load = Callable[[str, str], ShardIndex]
"""(URL, identity) → the index of a shard. Raises UserError where the shard is no longer the one of that identity."""


class Kind(NamedTuple):
    """What many shards have in common."""

    extensions: tuple[str, ...]
    damage: str


class Rows:
    """Facts of n shards.

    columns: name, version, digest, sha256, identity: bytes [n]. size, count, rejected, kind, damaged (0 or 1) and
    num_sizes (−1: not counted): int64 [n]. lowest: int64 [n, 4, 4], as of `ShardIndex`; hashes of 2³² where a shard has
    fewer rows. sizes: (width, height, samples) of one shard after another, int64.
    """

    def __init__(self, columns: dict[str, np.ndarray], kinds: Sequence[Kind]) -> None:
        self.columns, self.kinds = columns, list(kinds)
        self.size_starts = np.cumsum([0, *np.maximum(columns["num_sizes"], 0)])

    def __len__(self) -> int:
        return len(self.columns["count"])

    @classmethod
    def of(cls, indices: Iterable[ShardIndex]) -> Rows:
        """The facts of some indices, of which none stays open."""
        texts: dict[str, list[bytes]] = {name: [] for name in _TEXTS}
        numbers: dict[str, list[int]] = {name: [] for name in _NUMBERS}
        sizes: list[tuple[int, int, int]] = []
        lowest: list[Sequence[int]] = []
        kinds: dict[Kind, int] = {}
        for index in indices:
            for name in _TEXTS:
                texts[name].append(os.fsencode(getattr(index, name)))
            kind = kinds.setdefault(Kind(tuple(index.extensions), index.damage), len(kinds))
            num_sizes = -1 if index.sizes is None else len(index.sizes)
            facts = (index.size, len(index), index.num_rejected, kind, num_sizes, bool(index.damage))
            lowest += [*index.lowest, *[(_NO_HASH, 0, 0, 0)] * (NUM_LOWEST - len(index.lowest))]
            for name, value in zip(_NUMBERS, facts, strict=True):
                numbers[name].append(value)
            sizes += [(*side, count) for side, count in (index.sizes or {}).items()]
            index.release()
        columns = {name: np.array(values or [b""], "S")[: len(values)] for name, values in texts.items()}
        columns |= {name: np.array(values, np.int64) for name, values in numbers.items()}
        columns["lowest"] = np.array(lowest, np.int64).reshape(-1, NUM_LOWEST, 4)
        columns["sizes"] = np.array(sizes, np.int64).reshape(-1, 3)
        return cls(columns, list(kinds))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(k for part in parts for k in part.kinds))}
        columns = {}
        for name in (*_TEXTS, *_PER_SHARD, "sizes"):
            columns[name] = np.concatenate([part.columns[name] for part in parts])
        own = [np.array([kinds[kind] for kind in part.kinds] or [0], np.int64)[part.columns["kind"]] for part in parts]
        return cls({**columns, "kind": np.concatenate(own)}, list(kinds))

    def take(self, rows: np.ndarray) -> Rows:
        columns = {name: self.columns[name][rows] for name in (*_TEXTS, *_PER_SHARD)}
        lengths = np.maximum(columns["num_sizes"], 0)
        skipped = np.repeat(self.size_starts[rows] - np.cumsum(lengths) + lengths, lengths)
        columns["sizes"] = self.columns["sizes"][np.arange(len(skipped)) + skipped]
        return Rows(columns, self.kinds)

    def sizes(self, row: int) -> dict[tuple[int, int], int] | None:
        if self.columns["num_sizes"][row] < 0:
            return None
        listed = self.columns["sizes"][self.size_starts[row] : self.size_starts[row + 1]].tolist()
        return {(width, height): count for width, height, count in listed}

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        stored = {name: self.columns[name] for name in (*_PER_SHARD, "sizes")}
        for name in _TEXTS:
            values = np.ascontiguousarray(self.columns[name])
            stored[name] = values.view(np.uint8).reshape(len(values), -1)
        facts = {"format": FORMAT, "kinds": self.kinds, "pixels": max_pixels(), "crc32": _check_sum(stored)}
        with publish(folder / FILE) as temporary:
            save_file(stored, temporary, {"table": json.dumps(facts)})

    @classmethod
    def read(cls, folder: Path) -> Rows | None:
        """The facts that are kept in a folder of indices; None where there are none, or the file is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / FILE, framework="numpy") as file:
                facts = json.loads(file.metadata()["table"])
                columns = {name: file.get_tensor(name) for name in (*_TEXTS, *_PER_SHARD, "sizes")}
            if (facts["format"], facts["pixels"]) != (FORMAT, max_pixels()) or facts["crc32"] != _check_sum(columns):
                return None
            for name in _TEXTS:
                columns[name] = columns[name].reshape(-1).view(f"S{columns[name].shape[1]}")
            return cls(columns, [Kind(tuple(extensions), damage) for extensions, damage in facts["kinds"]])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # the indices have it all
            return None


def _check_sum(columns: Mapping[str, np.ndarray]) -> int:
    value = 0
    for name in sorted(columns):
        value = zlib.crc32(np.ascontiguousarray(columns[name]).data, value) if columns[name].size else value
    return value


class _Row(ShardIndex):
    """An index whose file is opened when a column is asked for."""

    def __init__(self, url: str, rows: Rows, row: int, load: Load) -> None:
        self.url, self._load = url, load
        self._source, self._buffer, self._arrays = b"", None, {}
        self.version, self.digest, self.sha256, self.identity = (
            os.fsdecode(rows.columns[name][row]) for name in ("version", "digest", "sha256", "identity")
        )
        self.size, self._count, self.num_rejected = (
            int(rows.columns[name][row]) for name in ("size", "count", "rejected")
        )
        self.lowest = rows.columns["lowest"][row][: self._count].tolist()
        extensions, self.damage = rows.kinds[rows.columns["kind"][row]]
        self.extensions = list(extensions)
        self.sizes = rows.sizes(row)
        self._rejected = None if self.num_rejected else []
        self._bad_captions = None

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _columns(self) -> dict[str, Any]:  # type: ignore[override]
        self._source, self._buffer = self._index._source, self._index._buffer
        return self._index._columns

    @cached_property
    def _index(self) -> ShardIndex:
        return self._load(self.url, self.identity)

    @property
    def num_strays(self) -> int:  # type: ignore[override]
        return self._index.num_strays

    @property
    def strays(self) -> list[str]:  # type: ignore[override]
        return self._index.strays

    @property
    def further_images(self) -> list[tuple[str, str, int]]:  # type: ignore[override]
        return self._index.further_images


class ShardTable(Sequence[ShardIndex]):
    """The indices of some shards, in their order.

    Iterating keeps no index. Of the items that are asked for by number the last 256 are kept, and so are their columns.
    held: by number, indices that no file holds.
    """

    def __init__(self, urls: Sequence[str], rows: Rows, load: Load, held: Mapping[int, ShardIndex]) -> None:
        assert len(urls) == len(rows)
        self.urls, self.rows, self._load, self._held = list(urls), rows, load, dict(held)
        self._opened: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def of(cls, indices: Sequence[ShardIndex]) -> ShardTable:
        if isinstance(indices, ShardTable):
            return indices
        rows = Rows.of(indices)
        return cls([index.url for index in indices], rows, _never, dict(enumerate(indices)))

    @classmethod
    def joined(cls, tables: Sequence[ShardTable]) -> ShardTable:
        """The shards of several tables whose indices are kept in one way."""
        if len(tables) == 1:
            return tables[0]
        urls = [url for table in tables for url in table.urls]
        held: dict[int, ShardIndex] = {}
        first = 0
        for table in tables:
            held |= {first + number: index for number, index in table._held.items()}
            first += len(table)
        return cls(urls, Rows.joined([table.rows for table in tables]), tables[0]._load, held)

    def __len__(self) -> int:
        return len(self.urls)

    def __iter__(self) -> Iterator[ShardIndex]:
        return map(self.facts, range(len(self)))

    @overload
    def __getitem__(self, number: int) -> ShardIndex: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardIndex]: ...
    def __getitem__(self, number: int | slice) -> ShardIndex | list[ShardIndex]:
        if isinstance(number, slice):
            return [self.facts(each) for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        index = self._opened.pop(number, None)
        self._opened[number] = index = self.facts(number) if index is None else index
        if len(self._opened) > _MAX_OPENED:
            self._opened.popitem(last=False)[1].release()
        return index

    def facts(self, number: int) -> ShardIndex:
        """The index, which is not kept."""
        held = self._held.get(number)
        return _Row(self.urls[number], self.rows, number, self._load) if held is None else held

    @property
    def kinds(self) -> list[Kind]:
        return [self.rows.kinds[number] for number in np.unique(self.rows.columns["kind"])]

    def of_some(self, column: str) -> Iterator[ShardIndex]:
        """The indices of which this column of numbers is not 0."""
        return map(self.__getitem__, np.flatnonzero(self.rows.columns[column]).tolist())

    def texts(self, column: str) -> list[str]:
        return [os.fsdecode(value) for value in self.rows.columns[column].tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}


def _never(url: str, identity: str) -> ShardIndex:
    raise AssertionError(f"{url}: the index is held")
