"""What a data set costs does not grow with sizes that nobody has: batches, broken samples, their list."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from stack.data import dataset
from stack.data.dataset import ImageData, ImageDataset
from stack.data.safety import RejectLog


@pytest.mark.parametrize("size", [10**12, 2**22 + 1, 10**6, 10**5])
def test_a_batch_that_no_memory_holds_is_an_error(mmdit, stage, tmp_path, size):
    config = stage.train_config("huge", run={"dir": str(tmp_path / "run")})
    for command in (config, stage.folder / "autoencoder.yaml"):
        done = mmdit("train", command, f"data.batch_size={size}", f"run.dir={tmp_path / 'run'}")
        assert (done.returncode, "data.batch_size" in done.stderr) == (2, True), done.stderr
        assert str(size) in done.stderr.splitlines()[-1]


def test_what_stands_in_for_a_broken_image_does_not_cost_the_set():
    """As in a set of a billion samples: its numbers are not written out."""
    fake = SimpleNamespace(_held_out=frozenset(), shards=SimpleNamespace(num_samples=10**9), _bucket=lambda sample: 0)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = ImageDataset._candidates(fake, 5 * 10**8, 0)  # type: ignore[arg-type]
    assert [next(found) for _ in range(3)] == [5 * 10**8, 5 * 10**8 + 1, 5 * 10**8 + 2]
    assert time.process_time() - began < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


@pytest.fixture
def two_buckets(tmp_path, pack, picture) -> ImageDataset:
    """Four shards of squares, with wide images among them here and there, and none in the third."""
    for shard, wide in enumerate([{3}, {0, 11}, set(), {5}]):
        members = []
        for row in range(12):
            data = picture(row, size=(80, 48) if row in wide else (32, 32))
            members += [(f"{shard}-{row:02}.png", data), (f"{shard}-{row:02}.txt", b"x")]
        pack(tmp_path / "shards" / f"{shard}.tar", members)
    config = ImageData(source=str(tmp_path / "shards"), batch_size=2, validation_share=0.2, max_validation=9)
    return ImageDataset(config, seed=0)


@pytest.mark.parametrize("near", [1, 5, 1024])
def test_samples_stand_in_in_their_order_each_once(two_buckets, monkeypatch, near):
    monkeypatch.setattr(dataset, "_NEAR", near)
    data, total = two_buckets, two_buckets.shards.num_samples
    assert 0 < len(data._held_out) < total
    for sample in range(total):
        bucket = data._bucket(sample)
        alike = [other for other in range(total) if data._bucket(other) == bucket]
        half = [other for other in alike if (other in data._held_out) == (sample in data._held_out)]
        expected = [sample, *(other for other in half if other > sample), *(other for other in half if other < sample)]
        found = data._candidates(sample, bucket)
        assert [next(found) for _ in expected] == expected
        if near == 1:
            assert list(found) == []


def test_far_samples_are_found_without_reading_shards_that_have_none(two_buckets, monkeypatch):
    monkeypatch.setattr(dataset, "_NEAR", 1)
    data, read = two_buckets, []
    (table,) = data._tables
    rows = table.rows
    monkeypatch.setattr(table, "rows", lambda shard: read.append(shard) or rows(shard))
    training = next(s for s in range(12, 48) if data._bucket(s) != data._bucket(1) and s not in data._held_out)
    list(data._candidates(training, data._bucket(training)))
    assert 2 not in read


def test_a_long_list_of_broken_samples_is_small_in_memory_and_quick(tmp_path):
    path, number = tmp_path / "rejected.jsonl", 50_000
    writer = RejectLog(path)
    lines = [
        {"shard": f"{row // 1000:05}.tar", "key": f"{row:09}", "reason": f"no label: {row}"} for row in range(number)
    ]
    assert len(writer.add_all(lines)) == number
    assert writer.add_all(lines) == []
    tracemalloc.start()
    reader, began = RejectLog(path), time.process_time()
    reader.read()
    assert time.process_time() - began < 5
    assert tracemalloc.get_traced_memory()[0] < 200 * number  # bytes; 600 for each, if the lines are kept
    tracemalloc.stop()
    assert reader.kinds == writer.kinds == {"no label": number}
    assert not reader.add("00000.tar", f"{0:09}", "no label")
    assert path.read_bytes().count(b"\n") == number


def test_the_console_names_some_broken_samples_and_the_list_all(tmp_path, pack, sample):
    members = [member for row in range(200) for member in sample(f"{row:03}", row % 16)]
    broken = [(name, b"no image" if name.endswith("png") and name < "150" else data) for name, data in members]
    pack(tmp_path / "shards" / "0.tar", broken)
    code = f"""
from stack.data.dataset import ImageData, ImageDataset
from stack.data.safety import RejectLog
from pathlib import Path
config = ImageData(source={str(tmp_path / "shards")!r}, batch_size=2, max_rejected=0.9)
ImageDataset(config, 0, RejectLog(Path({str(tmp_path / "rejected.jsonl")!r})))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out") == 101
    assert "further samples that are left out are listed in rejected.jsonl only" in done.stderr
    assert (tmp_path / "rejected.jsonl").read_bytes().count(b"\n") == 150
