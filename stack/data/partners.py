"""The second images of paired data: samples of other shards, found by their keys."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from stack.data.safety import DecodeError
from stack.data.shards import ShardReader, ShardSet


class Partners:
    """Images by key. Twelve bytes a sample are held, its key's hash and its id."""

    def __init__(self, shards: ShardSet, reader: ShardReader) -> None:
        self._shards, self._reader = shards, reader
        hashes = np.empty(len(shards), np.uint32)
        for shard, start in enumerate(shards.starts[:-1].tolist()):
            index = shards.index(shard)
            hashes[start : start + len(index)] = [crc32(index.key_bytes(row)) for row in range(len(index))]
        self._ids = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._ids]

    def read(self, key: str) -> bytes:
        """The image file of the sample `key`, the first of several. Raises DecodeError where there is none."""
        first, last = (
            int(np.searchsorted(self._hashes, crc32(key.encode("utf-8", "surrogateescape")), side))
            for side in ("left", "right")
        )
        for sample in self._ids[first:last].tolist():
            shard, row = self._shards.locate(sample)
            index = self._shards.index(shard)
            if index.key(row) == key:
                return self._reader.read(shard, row, index.image_extension(row))
        raise DecodeError("no partner: data.paired has no sample of this key")
