"""One pre-encoded shard: what is published is what its own writer wrote."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from stack.config import UserError
from stack.data.schema import EncodedSample
from stack.preencode.writer import ShardWriter, stats_path
from stack.text.conditioning import EncodedText


def add(writer: ShardWriter, *keys: str) -> None:
    text = EncodedText(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    for key in keys:
        writer.add(key, EncodedSample(torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), [text]), {})


def keys_of(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [name for name in tar.getnames() if name.endswith(".safetensors")]


def test_writers_of_one_shard_publish_their_own_files(tmp_path):
    """Their process ids may be equal, too: containers that share a host's name have their own."""
    path = tmp_path / "00000.tar"
    first, second = (ShardWriter(path, torch.bfloat16) for _ in range(2))
    add(first, "a", "b")
    add(second, "a")
    first.finish({})
    assert keys_of(path) == ["a.safetensors", "b.safetensors"]
    add(second, "b", "c")
    second.finish({})
    assert keys_of(path) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert json.loads(stats_path(path).read_text())["samples"] == 3
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_another_process_took_away_is_not_published(tmp_path, how):
    writer = ShardWriter(tmp_path / "00000.tar", torch.bfloat16)
    add(writer, "a")
    [partial] = tmp_path.glob(".*.tmp")
    partial.unlink()
    if how == "replaced":
        partial.write_bytes(b"half of a shard")
    with pytest.raises(UserError, match="another process removed or replaced this file while it was written"):
        writer.finish({})
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
