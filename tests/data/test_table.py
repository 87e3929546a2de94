"""The table of many shards: it has what their indices have, is no source of errors, and spares opening them."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import time
from collections import Counter
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from stack.config import UserError
from stack.data import shards as sharding
from stack.data.dataset import ImageData, ImageDataset
from stack.data.index import SUFFIX, ShardIndex
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.data.table import FILE, Rows, ShardTable

NUMBER = 90


@pytest.fixture(scope="module")
def source(tmp_path_factory, pack, sample, picture) -> Path:
    """90 shards of one to five samples, some with a broken one, some wide, one cut."""
    folder = tmp_path_factory.mktemp("table") / "shards"
    for number in range(NUMBER):
        members = [member for row in range(1 + number % 5) for member in sample(f"{number:03}-{row}", row)]
        if number % 7 == 0:
            members += [(f"{number:03}-no.png", b"no image"), (f"{number:03}-no.txt", b"x")]
        if number % 11 == 0:
            members += [(f"{number:03}-wide.png", picture(3, size=(80, 48))), (f"{number:03}-wide.txt", b"x")]
        pack(folder / f"{number:05}.tar", members)
    cut = folder / "00044.tar"
    cut.write_bytes(cut.read_bytes()[:-9_000])
    index_shards(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))  # with times


class Calls:
    """How often files are opened and asked about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        for module, name, counter in ((io, "open", self.opened), (os, "stat", self.asked), (os, "lstat", self.asked)):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name), counter))
        monkeypatch.setattr(builtins, "open", io.open)

    @staticmethod
    def _counted(call, counter):
        def counted(path, *arguments, **options):
            counter[str(path)] += 1
            return call(path, *arguments, **options)

        return counted


def facts(index: ShardIndex) -> tuple:
    names = ("url", "name", "size", "version", "digest", "sha256", "identity", "damage", "sizes", "lowest", "rejected")
    return (len(index), index.extensions, index.encoded, *(getattr(index, name) for name in names))


def test_its_rows_are_what_the_indices_have(folder):
    assert (folder / FILE).exists()
    table = index_shards(folder)
    for index, row in zip(
        (ShardIndex(row.url, Path(row.url).with_suffix(SUFFIX)) for row in table), table, strict=True
    ):
        assert facts(row) == facts(index)
        for name in ("width", "height", "caption_length", "by_hash"):
            assert np.array_equal(getattr(row, name), getattr(index, name))
        assert row.keys == index.keys
    assert [facts(row) for row in pickle.loads(pickle.dumps(table))] == [facts(row) for row in table]
    some = index_shards(f"{folder}/000[2-8]*.tar")
    assert [facts(row) for row in some] == [facts(row) for row in table if row.name >= "00020"]
    assert [row.name for row in table[3:9:2]] == ["00003.tar", "00005.tar", "00007.tar"]
    assert facts(table[-1]) == facts(list(table)[-1])
    assert len(table.kinds) == 2  # one is cut
    assert [row.name for row in table.of_some("damaged")] == ["00044.tar"]
    reader = ShardReader(table)
    assert reader.read(89, 0, "txt") == b"a picture of number 0"


def test_a_start_opens_no_index_and_asks_once_about_each_shard(folder, monkeypatch):
    config = ImageData(source=str(folder), batch_size=8, max_validation=3, max_rejected=0.5, window=10)
    ImageDataset(config, 0)
    calls = Calls(monkeypatch)
    data = ImageDataset(config, 0)
    data.plan.batch(1)
    for number in range(NUMBER):
        shard = folder / f"{number:05}.tar"
        assert calls.asked[str(shard)] <= 2
        assert calls.opened[str(shard)] + calls.opened[str(shard.with_suffix(SUFFIX))] <= 1
    before = calls.opened.total()
    index_shards(folder)
    assert calls.opened.total() == before  # the table is opened by safetensors, and nothing else is
    assert before < NUMBER


def test_the_held_out_samples_are_those_of_the_lowest_hashes(folder):
    samples = ShardSet(index_shards(folder))
    keys = [(crc32(samples.key(sample).encode()), sample) for sample in range(len(samples))]
    for count, below in ((0, 2**32), (1, 2**32), (7, 2**32), (50, 2**31), (10**6, 2**32), (10**6, 2**28), (9, 0)):
        expected = sorted(sample for value, sample in sorted(keys)[:count] if value < below)
        ids, width, height = samples.held_out(count, below)
        assert ids.tolist() == expected
        for sample, *size in zip(ids.tolist(), width.tolist(), height.tolist(), strict=True):
            shard, row = samples.locate(sample)
            assert size == [samples.index(shard).width[row], samples.index(shard).height[row]]


def test_changed_shards_are_noticed_and_unchanged_ones_are_not(folder, pack, sample):
    before = [row.identity for row in index_shards(folder)]
    for number in range(0, NUMBER, 2):
        os.utime(folder / f"{number:05}.tar", ns=(number + 1, number + 1))
    assert [row.identity for row in index_shards(folder)] == before
    pack(folder / "00003.tar", sample("other"))
    pack(folder / "00010.tar", sample("other"))
    with pytest.raises(UserError, match=r"2 shards changed since they were indexed: .*00003\.tar .*00010\.tar"):
        index_shards(folder)
    assert [len(row) for row in index_shards(folder, rebuild=True)][3:11:7] == [1, 1]
    (folder / "00005.tar").unlink()
    pack(folder / "99999.tar", sample("new"))
    table = index_shards(folder)
    assert [row.name for row in table] == sorted(path.name for path in folder.glob("*.tar"))
    assert table[-1].keys == ["new"]


@pytest.mark.parametrize("content", [b"", b"x" * 99, None, "other format", "other bytes"])
def test_a_damaged_table_is_no_matter(folder, content):
    expected = [facts(row) for row in index_shards(folder)]
    path = folder / FILE
    data = path.read_bytes()
    if content is None:
        path.unlink()
        path.mkdir()
    elif content == "other format":
        path.write_bytes(data.replace(b'\\"format\\": 5', b'\\"format\\": 4'))
    elif content == "other bytes":
        path.write_bytes(data[:-40] + bytes(40))
    else:
        path.write_bytes(content)
    assert Rows.read(folder) is None
    assert [facts(row) for row in index_shards(folder)] == expected
    if content is not None:
        assert Rows.read(folder) is not None  # it is written anew


def test_without_room_for_a_table_the_indices_do(folder, monkeypatch):
    (folder / FILE).unlink()

    def full(rows, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Rows, "save", full)
    assert sum(map(len, index_shards(folder))) == sum(map(len, index_shards(folder)))
    assert not (folder / FILE).exists()


def test_an_index_that_is_gone_is_built_when_it_is_needed(folder):
    table = index_shards(folder)
    (folder / f"00007{SUFFIX}").unlink()
    shutil.copy(folder / f"00001{SUFFIX}", folder / f"00002{SUFFIX}")  # another shard's
    table = index_shards(folder)
    assert table[7].key(0) == "007-0"
    assert table[2].key(0) == "002-0"
    assert ShardIndex("", folder / f"00002{SUFFIX}").key(0) == "002-0"


def test_a_table_that_is_of_another_shard_says_what_to_do(folder, pack, sample):
    """A shard of the same size and time, which only its index would tell."""
    shard, index = folder / "00006.tar", folder / f"00006{SUFFIX}"
    times, data = shard.stat(), shard.read_bytes()
    shard.write_bytes(data.replace(b"a picture of number 1", b"a drawing of number 1"))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    index.unlink()
    table = index_shards(folder)
    with pytest.raises(UserError, match=r"00006\.tar: .*mmdit data index"):
        table[6].key(0)
    (new,) = {index_shards(folder, rebuild=again)[6].identity for again in (True, False)}
    assert new != table[6].identity
    assert index_shards(folder)[6].key(0) == "006-0"


def test_slow_files_are_asked_about_many_at_a_time(folder, monkeypatch):
    stat = os.stat

    def slow(path, *arguments, **options):
        if str(path).endswith(".tar"):
            time.sleep(0.02)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", slow)
    began = time.perf_counter()
    index_shards(folder)
    assert time.perf_counter() - began < 0.6 * NUMBER * 0.02


def test_tables_of_several_sources_are_joined(folder, source):
    one, other = index_shards(f"{folder}/0000*.tar"), index_shards(source)
    joined = ShardTable.joined([one, other])
    assert [facts(row) for row in joined] == [*map(facts, one), *map(facts, other)]
    assert ShardSet(joined).num_samples == sum(map(len, one)) + sum(map(len, other))
    assert sharding._MIN_TABLE <= NUMBER
