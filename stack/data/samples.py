"""The samples of many shards as one set, and those of them that are trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal
from zlib import crc32

import numpy as np

from stack.data.identity import Part
from stack.data.index import ShardIndex
from stack.data.plan import Rows
from stack.data.table import ShardTable

_HASHES = 16  # of one index that are looked at at a time


class ShardSet:
    """The samples of many shards under one global id, 0 … num_samples − 1, in the order of the shards.

    Columns of at most 256 shards are mapped at once, so memory does not grow with the set.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = ShardTable.of(indices)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.indices.rows.columns["count"])])
        """First id of each shard, and the number of samples; int64 [shards + 1]."""
        self.num_samples = int(self.starts[-1])

    def __len__(self) -> int:
        return self.num_samples

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, whose columns may be mapped until the next calls."""
        return self.indices[shard]

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in its index). Raises IndexError."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def key(self, sample_id: int) -> str:
        shard, row = self.locate(sample_id)
        return self.index(shard).key(row)

    @property
    def num_rejected(self) -> int:
        """Samples that the indices leave out."""
        return int(self.indices.rows.columns["rejected"].sum())

    def held_out(self, count: int, below: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, widths, heights) of the `count` samples whose keys have the lowest crc32 below a limit, int64 [n].

        They are sorted by id.
        An index is opened only if more of its samples may be among them than its table has: of many shards, few are.
        """
        hashes, rows, width, height = np.moveaxis(self.indices.rows.columns["lowest"], -1, 0)
        columns = hashes, self.starts[:-1, None] + rows, width, height
        known = [column[hashes < below] for column in columns]
        last = below - 1 if len(known[0]) < count else int(np.sort(known[0])[count - 1]) if count else -1
        more = (hashes[:, -1] <= last) & (np.diff(self.starts) > hashes.shape[1])
        parts = [np.stack([column[~more][hashes[~more] <= last] for column in columns], axis=1)]
        for shard in np.flatnonzero(more).tolist():
            index, found = self.index(shard), []
            for at in range(0, len(index), _HASHES):
                near = index.by_hash[at : at + _HASHES]
                values = np.array([crc32(index.key_bytes(row)) for row in near.tolist()], np.int64)
                near, values = near[values <= last], values[values <= last]
                ids = self.starts[shard] + near.astype(np.int64)
                found.append(np.stack([values, ids, index.width[near], index.height[near]], axis=1))
                if len(near) < _HASHES:
                    break
            parts += found
        listed = np.concatenate(parts)
        listed = listed[np.lexsort((listed[:, 1], listed[:, 0]))][:count]
        ids, width, height = listed[np.argsort(listed[:, 1])][:, 1:].T
        return ids, width, height

    def part(self, role: Literal["train", "paired"], weight: float | None) -> Part:
        """The shards as a part of the identity of a training's data."""
        names, contents = map(self.indices.texts, ("name", "identity"))
        return Part(role=role, weight=weight, names=names, contents=contents)

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the shards and their digests: the manifest's source."""
        names, digests = map(self.indices.texts, ("name", "digest"))
        layout = list(zip(names, self.indices.rows.columns["size"].tolist(), digests, strict=True))
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


class TrainingSamples:
    """The training samples of one data set, as the batch plan asks for them. `shards` are its own of the set's."""

    def __init__(
        self,
        samples: ShardSet,
        shards: range,
        bucket_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
        num_buckets: int,
        held_out: tuple[np.ndarray, np.ndarray],
        weight: float | None,
        caption_weights: Sequence[float],
    ) -> None:
        """held_out: ids and buckets of the samples that are not trained on, in all sets."""
        self._samples, self.shards, self._bucket_of, self._held_out = samples, shards, bucket_of, held_out[0]
        self.weight, self.caption_weights = weight, caption_weights
        self.counts = np.zeros((len(shards), num_buckets), np.int64)
        table = samples.indices.rows
        num_sizes = table.columns["num_sizes"][shards.start : shards.stop]
        sizes = table.columns["sizes"][table.size_starts[shards.start] : table.size_starts[shards.stop]]
        owners = np.repeat(np.arange(len(shards)), np.maximum(num_sizes, 0))
        np.add.at(self.counts, (owners, bucket_of(sizes[:, 0], sizes[:, 1])), sizes[:, 2])
        for number in np.flatnonzero(num_sizes < 0).tolist():
            index = samples.index(shards.start + number)
            self.counts[number] = np.bincount(bucket_of(index.width, index.height), minlength=num_buckets)
        owners = np.searchsorted(samples.starts, held_out[0], side="right") - 1 - shards.start
        own = (owners >= 0) & (owners < len(shards))
        np.subtract.at(self.counts, (owners[own], held_out[1][own]), 1)

    def rows(self, shard: int) -> Rows:
        shard += self.shards.start
        start, stop = self._samples.starts[shard : shard + 2].tolist()
        first, last = np.searchsorted(self._held_out, (start, stop))
        kept = np.delete(np.arange(stop - start), self._held_out[first:last] - start)
        lengths = self._samples.index(shard).caption_length[kept, : len(self.caption_weights)]
        absent = len(self.caption_weights) - lengths.shape[1]  # captions that no sample of this shard has
        lengths = np.pad(lengths, ((0, 0), (0, absent)), constant_values=-1)
        return Rows(start + kept, self._bucket(shard, kept), lengths)

    def _bucket(self, shard: int, rows: Any) -> np.ndarray:
        index = self._samples.index(shard)
        return self._bucket_of(index.width[rows], index.height[rows])
