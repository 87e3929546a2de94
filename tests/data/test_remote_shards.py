"""Shards that are read from a store: what is on the disk meanwhile, and which index is believed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stack.data import remote
from stack.data.remote import ShardCache
from stack.data.shards import ShardReader, index_shards


def _on_disk(folder: Path) -> int:
    """Bytes of the files of a cache, and of those that this process has open though they were removed."""
    found = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            if str(folder) in os.readlink(descriptor):  # a mapped file has a descriptor, too
                found[os.stat(descriptor).st_ino] = os.stat(descriptor).st_size
    return sum(found.values())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")
@pytest.mark.parametrize("way", ["read", "view"])
def test_what_is_read_stays_within_the_cache(
    way: str, store: Any, cache: ShardCache, tmp_path: Path, pack: Callable, sample: Callable
) -> None:
    for number in range(30):
        members = [*sample(f"{number:05}", number % 16), (f"{number:05}.cls", bytes(2 * remote.CHUNK))]
        store.add(f"/x/{number:05}.tar", pack(tmp_path / "x.tar", members).read_bytes())
    indices = index_shards(f"{store.root}/x", None, cache)
    reader = ShardReader(indices, cache)
    most = 0
    for shard in (*range(30), *range(30)):
        expected = f"a picture of number {shard % 16}".encode()
        if way == "read":
            assert reader.read(shard, 0, "txt") == expected
        else:
            offset, length = indices[shard].span(0, "txt")
            assert reader.view(shard)[offset : offset + length] == expected
        most = max(most, _on_disk(cache.dir))
    assert cache.max_bytes / 2 < most <= cache.max_bytes
    reader.close()
