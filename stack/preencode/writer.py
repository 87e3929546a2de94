"""Writes one pre-encoded shard: NNNNN.tar, its index and, last, NNNNN_stats.json, each published by rename.

A shard whose stats file stands is finished; whatever a kill leaves without it is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import webdataset

from stack.config import UserError
from stack.data.index import SUFFIX
from stack.data.schema import EncodedSample, T5Dtype, sample_to_bytes
from stack.data.shards import index_shards
from stack.files import create, is_at, publish, temporary_name
from stack.preencode.stats import stats_path


class ShardWriter:
    """Collects the samples of one output shard in order. Use `finish` to publish; without it nothing appears."""

    def __init__(self, path: Path, dtype: torch.dtype, t5_dtype: T5Dtype = None):
        self.path = path
        self._dtype, self._t5_dtype = dtype, t5_dtype
        self._partial = temporary_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = create(self._partial)  # a name would be taken for a URL if it looks like one
        self._tar = webdataset.TarWriter(self._file, mtime=0, mode=0o644)
        self._count = 0
        self._positions = 0
        self._sum: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, key: str, sample: EncodedSample, facts: dict[str, Any]) -> None:
        """One sample; `facts` becomes KEY.json."""
        data = sample_to_bytes(sample, self._dtype, self._t5_dtype)
        self._tar.write({"__key__": key, "safetensors": data, "json": json.dumps(facts, sort_keys=True).encode()})
        self._count += 1
        values = sample.latent_mean.double().flatten(1)
        variance = sample.latent_logvar.double().exp().flatten(1)
        self._positions += values.shape[1]
        self._sum = self._sum + values.sum(1)
        self._squares = self._squares + (values.square() + variance).sum(1)

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Publish tar, index and stats, which are returned: `facts`, counts, sums over the latent, sha256.

        Raises UserError where the temporary file is no longer the one that was written.
        """
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.sha256()
        while piece := self._file.read(2**24):
            digest.update(piece)
        os.fchmod(self._file.fileno(), 0o644)
        if not is_at(self._partial, self._file.fileno()):
            problem = "another process removed or replaced this file while it was written; start again"
            raise UserError(f"{self._partial}: {problem}")
        self._file.close()
        os.replace(self._partial, self.path)
        index_shards(self.path, rebuild=True)
        stats = {
            **facts,
            "samples": self._count,
            "sha256": digest.hexdigest(),
            "positions": self._positions,
            "sum": torch.as_tensor(self._sum).tolist(),
            "squares": torch.as_tensor(self._squares).tolist(),
        }
        with publish(stats_path(self.path)) as temporary:
            temporary.write_text(json.dumps(stats, sort_keys=True), encoding="utf-8")
        return stats

    def abandon(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._file.close()


def outputs(shard: Path) -> list[Path]:
    """What `ShardWriter.finish` publishes."""
    return [shard, shard.with_name(shard.stem + SUFFIX), stats_path(shard)]
