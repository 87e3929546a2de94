"""A shard is known by its content: copies, other times, and shards that really changed."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stack.config import UserError
from stack.data.index import SUFFIX, ShardIndex
from stack.data.shards import ShardReader, index_shards


@pytest.fixture(scope="module")
def samples(sample) -> Callable[[int], list[tuple[str, bytes]]]:
    return lambda count: [member for number in range(count) for member in sample(f"{number:05}", number)]


@pytest.fixture(scope="module")
def three_shards(pack, samples) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for number, count in enumerate([3, 1, 2]):
            pack(folder / f"{number:05}.tar", samples(count))
        return folder

    return write


def test_a_shard_of_another_time_is_the_same_shard(tmp_path: Path, three_shards) -> None:
    """cp, rsync, touch and other mounts change times, and nothing else."""
    folder = three_shards(tmp_path / "data")
    found = {index.name: index.identity for index in index_shards(folder)}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    os.utime(folder / "00001.tar", ns=(1, 1))
    for place in (copy, folder):
        assert {index.name: index.identity for index in index_shards(place)} == found
        for shard in place.glob("*.tar"):  # its index is renewed
            assert ShardIndex("", shard.with_suffix(SUFFIX)).version == str(shard.stat().st_mtime_ns)
    renamed = tmp_path / "renamed.tar"
    (folder / "00001.tar").rename(renamed)
    assert index_shards(renamed)[0].identity == found["00001.tar"]


def test_all_changed_shards_are_named_at_once(tmp_path: Path, pack, samples) -> None:
    for number in range(14):
        pack(tmp_path / f"{number:05}.tar", samples(2))
    index_shards(tmp_path)
    for number in range(13):
        pack(tmp_path / f"{number:05}.tar", samples(3) if number else [*samples(2)[:3], *samples(2)[3:5]])
    with pytest.raises(UserError) as error:
        index_shards(tmp_path)
    said = str(error.value)
    assert "13 shards changed since they were indexed" in said
    assert [f"{number:05}.tar" in said for number in range(14)] == [True] * 10 + [False] * 4
    assert f"and 3 more; index them again: mmdit data index {tmp_path}" in said
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(f"*{SUFFIX}")}
    with pytest.raises(UserError, match="13 shards changed"):  # nothing was taken for the shards by trying
        index_shards(tmp_path)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(f"*{SUFFIX}")}
    assert [len(index) for index in index_shards(tmp_path, rebuild=True)] == [
        2 if n in (0, 13) else 3 for n in range(14)
    ]


def test_an_error_that_may_pass_is_not_a_missing_index(tmp_path: Path, monkeypatch, three_shards) -> None:
    folder = three_shards(tmp_path / "data")
    reader = ShardReader(index_shards(folder))

    def stale(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(("00001.tar", f"00001{SUFFIX}")):
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, *arguments, **options)

    opened = io.open
    monkeypatch.setattr(io, "open", stale)
    monkeypatch.setattr("builtins.open", stale)
    with pytest.raises(OSError, match="Stale") as error:
        index_shards(folder)
    assert not isinstance(error.value, UserError)
    with pytest.raises(OSError, match="Stale") as error:
        reader.read(1, 0, "txt")
    assert not isinstance(error.value, UserError)


def test_a_reader_compares_the_content_of_a_shard_of_another_time(tmp_path: Path, three_shards) -> None:
    """Nodes with copies of their own see other times than rank 0, which has read the indices."""
    folder = three_shards(tmp_path / "data")
    indices = index_shards(folder, tmp_path / "cache")
    for number in range(2):
        os.utime(folder / f"{number:05}.tar", ns=(1, 1))
    reader = ShardReader(indices, max_open=1)
    for shard in (0, 1, 0):
        assert reader.read(shard, 0, "txt") == b"a picture of number 0"
    data = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(data[:-1] + b"x")
    with pytest.raises(UserError, match=r"00002.tar: the shard changed .*other content of the same size"):
        reader.read(2, 0, "txt")
