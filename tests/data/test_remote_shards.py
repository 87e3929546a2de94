"""Shards that are read from a store: what is on the disk meanwhile, and which index is believed."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from stack.data import remote
from stack.data.dataset import LatentBatch, LatentData, LatentDataset
from stack.data.index import SUFFIX
from stack.data.plan import StepSampler
from stack.data.remote import CacheConfig, ShardCache
from stack.data.shards import ShardReader, index_shards
from stack.preencode.pipeline import Encoders


def _on_disk(folder: Path) -> int:
    """Bytes of the files of a cache, and of those that this process has open though they were removed."""
    found = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            if os.path.dirname(os.readlink(descriptor)) == str(folder):  # a mapped file has a descriptor, too
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


def _publish(store: Any, shard: Path, name: str = "0") -> None:
    """A shard and the index beside it, in this order."""
    index_shards(shard, rebuild=True)
    for path in (shard, shard.with_suffix(SUFFIX)):
        store.add(f"/p/{name}{path.name.removeprefix(shard.stem)}", path.read_bytes())


@pytest.mark.parametrize("told", ["time and tag", "time", "tag"])
def test_an_index_beside_a_shard_must_be_of_this_shard(
    told: str,
    store: Any,
    cache: ShardCache,
    tmp_path: Path,
    pack: Callable,
    sample: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.etags, store.times = "tag" in told, "time" in told
    _publish(store, pack(tmp_path / "a.tar", sample("s", 1)))
    url = f"{store.root}/p/0.tar"
    store.changes = {"/p/0.tar": 1, f"/p/0{SUFFIX}": 1}
    [index] = index_shards(url, tmp_path / "first", cache)
    fetched = [path for method, path, _ in store.requests if method == "GET" and path.endswith(".tar")]
    assert bool(fetched) == (told == "tag")  # no time, no proof
    assert ShardReader([index], cache).read(0, 0, "txt") == b"a picture of number 1"

    capsys.readouterr()
    other = pack(tmp_path / "b.tar", sample("s", 2))
    assert other.stat().st_size == index.size
    store.add("/p/0.tar", other.read_bytes())
    [again] = index_shards(url, tmp_path / "second", cache)
    assert ShardReader([again], cache).read(0, 0, "txt") == b"a picture of number 2"
    assert again.digest == index_shards(other)[0].digest != index.digest
    said = capsys.readouterr().err
    assert "1 of 1 indices beside the shards may be of others that stood there before" in said
    assert "store an index after its shard" in said


def test_the_time_of_a_file_is_that_of_its_store(either: Any, tmp_path: Path) -> None:
    for path in ("/t/0.tar", f"/t/0{SUFFIX}", f"/t/0{SUFFIX}"):
        either.add(path, b"x")
    shard, index = (remote.modified(f"{either.root}/t/0{end}") for end in (".tar", SUFFIX))
    assert shard is not None
    assert index is not None
    assert shard <= index
    (tmp_path / "x").touch()
    assert remote.modified(f"file://{tmp_path}/x") == pytest.approx((tmp_path / "x").stat().st_mtime)


def _put(store: Any, folder: Path, name: str) -> str:
    """The URL of a copy of `folder`, indices last."""
    paths = [path for path in folder.glob("[!.]*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name.endswith(SUFFIX)):
        store.add(f"/{name}/{path.name}", path.read_bytes())
    return f"{store.root}/{name}"


def _latents(path: str, **keys: Any) -> LatentDataset:
    return LatentDataset(LatentData(path=path, batch_size=8, max_validation=8, **keys), seed=0)


def _batches(data: LatentDataset) -> list[LatentBatch]:
    return list(data.loader(0, 12, 0, 1, 1))


def test_training_data_from_a_store_that_fails_at_times(
    either: Any, stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = _put(either, stage.encoded, "train")
    either.reset()
    either.on_get = lambda number: either.failures["GET"].append(503) if number % 3 == 0 else None
    either.failures["HEAD"].extend([503] * 2)
    data = _latents(url, cache=CacheConfig(dir=tmp_path / "cache", max_gb=0.001))
    for one, other in zip(_batches(_latents(str(stage.encoded))), _batches(data), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.mean_BCHW, other.mean_BCHW)
    assert capsys.readouterr().err.count("HTTP 503; attempt 2 of 6") > 4


def test_a_window_that_the_cache_does_not_hold_is_said(
    store: Any, stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = _put(store, stage.encoded, "train")
    sizes = [path.stat().st_size for path in stage.encoded.glob("*.tar")]
    keys: dict[str, Any] = {"validation_share": 0}
    whole = sum(sizes) / 1e9
    for max_gb, window, windows in ((whole, 96, ""), (whole - 1e-9, 96, "a window"), (1e-6, 40, "two windows")):
        data = _latents(url, cache=CacheConfig(dir=tmp_path / "cache", max_gb=max_gb), window=window, **keys)
        capsys.readouterr()
        last = next(step for step in range(99) if data.plan.window_of(step + 1) > 2 * (window == 40))
        data._fetch_ahead(StepSampler(data.plan, 0, last, 0, 1, 1))
        said = capsys.readouterr().err
        if not windows:
            assert said == ""
            continue
        assert said.startswith(f"the shards of {windows} have ")
        assert f" GB, more than data.cache.max_gb={max_gb:.6g}: they may be fetched many times" in said
        assert "raise it, or lower data.window" in said
        assert said.count("\n") == 1
        assert window == 40 or f" {whole:.6g} GB" in said


def _slowly(monkeypatch: pytest.MonkeyPatch, wait: Callable[[int], object]) -> list[float]:
    """Call `wait(n)` inside the encoders before they take the nth chunk; the seconds that each takes in all."""
    encode, seconds = Encoders._encode, []

    def slow(self: Encoders, chunk: list[Any]) -> list[Any]:
        began = time.monotonic()
        wait(len(seconds))
        samples = encode(self, chunk)
        seconds.append(time.monotonic() - began)
        return samples

    monkeypatch.setattr(Encoders, "_encode", slow)
    return seconds


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")
def test_pre_encoding_from_a_store_that_fails_at_times(
    either: Any,
    stage: Any,
    mmdit: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = _put(either, stage.shards, "raw")
    either.reset()
    either.on_get = lambda number: either.failures["GET"].append(503) if number % 3 == 0 else None
    either.failures["HEAD"].extend([503] * 2)
    sizes, most = sorted(path.stat().st_size for path in stage.shards.glob("*.tar")), []
    room = sizes[-1] + sizes[-2]

    def look(number: int) -> None:
        """Once the next shard is there, too."""
        deadline = time.monotonic() + 20
        while number + 1 < len(sizes) and _on_disk(tmp_path / "cache") <= sizes[-1] and time.monotonic() < deadline:
            time.sleep(0.05)
        most.append(_on_disk(tmp_path / "cache"))

    _slowly(monkeypatch, look)
    options = (f"source={url}", f"out={tmp_path}/out", f"cache.dir={tmp_path}/cache", f"cache.max_gb={room / 1e9}")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("HTTP 503; attempt 2 of 6") > 4
    assert len(most) == 3
    assert sizes[-1] < max(most) <= room
    for path in stage.encoded.glob("[!.]*"):
        if path.is_file() and not path.name.endswith(SUFFIX):  # an index says when its shard was written
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_next_shard_is_fetched_while_one_is_encoded(
    store: Any, stage: Any, mmdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = _put(store, stage.shards, "raw")
    names = sorted(path.name for path in stage.shards.glob("*.tar"))
    cache = tmp_path / "cache"

    def wait(number: int) -> None:
        deadline = time.monotonic() + 20
        while number + 1 < len(names) and not list(cache.glob(f"[!.]*-{names[number + 1]}")):
            assert time.monotonic() < deadline, f"{names[number + 1]} is not fetched"
            time.sleep(0.02)

    index_shards(url, tmp_path / "index", ShardCache(CacheConfig(dir=tmp_path / "indexing")))
    seconds = _slowly(monkeypatch, wait)
    store.on_get = lambda number: time.sleep(1)
    options = (f"source={url}", f"index={tmp_path}/index", f"out={tmp_path}/out", f"cache.dir={cache}")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert done.returncode == 0, done.stderr
    said = re.search(r"out: ([0-9.]+) s, ([0-9.]+) % of them inside the encoders", done.stderr)
    assert said is not None
    assert float(said[1]) * float(said[2]) / 100 == pytest.approx(sum(seconds), abs=0.5)
    assert sum(seconds) > len(names) - 1
