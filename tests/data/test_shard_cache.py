from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from stack.config import UserError
from stack.data import remote
from stack.data.remote import CacheConfig, ShardCache, read_bytes, stat

FORK = multiprocessing.get_context("fork")  # as DataLoader starts its workers


def _cached(cache: ShardCache) -> list[str]:
    """Names behind the digests of what is cached; anything else but the lock is an error."""
    names = {path.name for path in cache.dir.iterdir()} - {".lock"}
    assert all(re.fullmatch(r"[0-9a-f]{32}-.+", name) for name in names), names
    return sorted(name[33:] for name in names)


def _in_processes(*calls: Callable[[], object]) -> list[int | None]:
    """Exit codes of the calls, each in a forked process of its own, all at the same time."""
    processes = [FORK.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_shard_is_downloaded_once(store: Any, cache: ShardCache) -> None:
    data = store.put("/x/00000.tar", 2 * remote.CHUNK), store.put("/y/00000.tar", 2 * remote.CHUNK, seed=1)
    urls = [f"{store.url}/{folder}/00000.tar" for folder in "xy"]
    expected = [stat(url) for url in urls]
    for _ in range(3):
        paths = [cache.fetch(url, each) for url, each in zip(urls, expected, strict=True)]
        assert tuple(path.read_bytes() for path in paths) == data
        with cache.open(urls[0], expected[0]) as file:
            assert os.pread(file.fileno(), 10, remote.CHUNK) == data[0][remote.CHUNK : remote.CHUNK + 10]
    assert len(store.gets()) == 4
    assert _cached(cache) == ["00000.tar"] * 2  # equal names of two folders


def test_an_empty_shard(store: Any, cache: ShardCache) -> None:
    store.put("/a.tar", 0)
    assert cache.fetch(f"{store.url}/a.tar", stat(f"{store.url}/a.tar")).read_bytes() == b""


def test_a_changed_shard_must_be_indexed_again(store: Any, cache: ShardCache) -> None:
    url = f"{store.url}/a.tar"
    store.put("/a.tar", remote.CHUNK)
    old = stat(url)
    cache.fetch(url, old)
    data = store.put("/a.tar", remote.CHUNK, seed=1)
    cache.fetch(url, old)  # what is cached is still what was indexed
    cache.fetch(url, stat(url))
    assert cache.fetch(url, stat(url)).read_bytes() == data
    assert _cached(cache) == ["a.tar"] * 2
    for path in cache.dir.glob("*.tar"):
        path.unlink()
    for wrong in (old, stat(url)._replace(size=remote.CHUNK - 1)):
        with pytest.raises(UserError, match=r"a\.tar: changed since it was indexed .*; index it again"):
            cache.fetch(url, wrong)
    del store.files["/a.tar"]
    with pytest.raises(UserError, match="gone since it was indexed"):
        cache.fetch(url, old)
    assert _cached(cache) == []


def test_a_change_during_the_download_is_noticed(store: Any, bucket: Any, cache: ShardCache) -> None:
    store.put("/a.tar", 4 * remote.CHUNK)
    expected = stat(f"{store.url}/a.tar")
    store.on_get = lambda number: store.put("/a.tar", 4 * remote.CHUNK, seed=1) if number == 3 else None
    with pytest.raises(UserError, match="changed since it was indexed"):
        cache.fetch(f"{store.url}/a.tar", expected)
    bucket.put("c/a.tar", 4 * remote.CHUNK)
    expected = stat("s3://shards/c/a.tar")
    changes = [lambda: bucket.put("c/a.tar", 4 * remote.CHUNK, seed=1)]
    bucket.on_get = lambda number: changes.pop()() if number == 3 and changes else None
    with pytest.raises(UserError, match="changed"):
        cache.fetch("s3://shards/c/a.tar", expected)
    assert _cached(cache) == []


def test_the_least_recently_used_make_room(store: Any, cache: ShardCache) -> None:
    shards = {
        name: (f"{store.url}/{name}.tar", store.put(f"/{name}.tar", 3 * remote.CHUNK, seed))
        for seed, name in enumerate("abcd")
    }
    expected = {name: stat(url) for name, (url, _) in shards.items()}

    def fetch(name: str) -> Path:
        return cache.fetch(shards[name][0], expected[name])

    cache.dir.mkdir()
    (cache.dir / "thesis.tex").write_text("not ours, and old")
    os.utime(cache.dir / "thesis.tex", (0, 0))
    for second, name in enumerate("abc"):
        os.utime(fetch(name), (second, second))
    reader = fetch("b").open("rb")
    os.utime(fetch("b"), (1, 1))
    fetch("a")  # used now: b is the oldest
    fetch("d")
    (cache.dir / "thesis.tex").rename(cache.dir.parent / "thesis.tex")
    assert _cached(cache) == ["a.tar", "c.tar", "d.tar"]
    with reader:
        assert reader.read() == shards["b"][1]  # evicted under its reader
    fetch("b")
    assert _cached(cache) == ["a.tar", "b.tar", "d.tar"]


def test_a_shard_larger_than_the_cache(store: Any, cache: ShardCache) -> None:
    store.put("/a.tar", 10 * remote.CHUNK)
    store.put("/b.tar", 10 * remote.CHUNK + 1)
    cache.fetch(f"{store.url}/a.tar", stat(f"{store.url}/a.tar"))
    with pytest.raises(UserError, match=r"b\.tar: the shard has 0\.000655361 GB, the cache holds max_gb=0\.00065536$"):
        cache.fetch(f"{store.url}/b.tar", stat(f"{store.url}/b.tar"))
    assert _cached(cache) == ["a.tar"]


def test_processes_share_one_download(store: Any, cache: ShardCache) -> None:
    data = store.put("/a.tar", 5 * remote.CHUNK)
    expected = stat(f"{store.url}/a.tar")
    store.on_get = lambda number: time.sleep(0.05)

    def fetch() -> None:
        assert cache.fetch(f"{store.url}/a.tar", expected).read_bytes() == data

    assert _in_processes(*[fetch] * 6) == [0] * 6
    assert len(store.gets()) == 5
    assert _cached(cache) == ["a.tar"]


def test_who_waited_looks_again(store: Any, cache: ShardCache) -> None:
    store.put("/a.tar", 10)
    url, expected = f"{store.url}/a.tar", stat(f"{store.url}/a.tar")
    entry = cache.fetch(url, expected)
    away = entry.rename(cache.dir / "away")
    with (cache.dir / f".{entry.name}.part").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=cache.fetch, args=(url, expected))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
        away.rename(entry)
    waiting.join(10)
    assert len(store.gets()) == 1
    assert _cached(cache) == ["a.tar"]


def test_a_process_forked_during_a_download_holds_no_lock(store: Any, cache: ShardCache) -> None:
    data = store.put("/a.tar", 10)
    url, expected = f"{store.url}/a.tar", stat(f"{store.url}/a.tar")
    sleeper = FORK.Process(target=time.sleep, args=(60,))
    waiting = threading.Thread(target=cache.fetch, args=(url, expected))

    def fork(number: int) -> None:
        sleeper.start()
        waiting.start()
        time.sleep(0.2)

    store.on_get = fork
    assert cache.fetch(url, expected).read_bytes() == data
    waiting.join(10)
    assert not waiting.is_alive()
    assert sleeper.is_alive()
    sleeper.kill()
    sleeper.join()


def test_concurrent_downloads_stay_below_the_bound(store: Any, cache: ShardCache) -> None:
    names = [f"/{number}.tar" for number in range(4)]
    data = [store.put(name, 4 * remote.CHUNK, seed) for seed, name in enumerate(names)]
    expected = [stat(store.url + name) for name in names]
    store.on_get = lambda number: time.sleep(0.01)
    sizes, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            try:
                sizes.append(sum(path.stat().st_size for path in cache.dir.iterdir()))
            except FileNotFoundError:
                continue

    def fetch(order: list[int]) -> None:
        for number in order:
            with cache.open(store.url + names[number], expected[number]) as file:
                assert file.read() == data[number]

    watcher = threading.Thread(target=watch)
    watcher.start()
    orders = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 2, 1, 0]]
    assert _in_processes(*[lambda order=order: fetch(order) for order in orders]) == [0] * 4
    done.set()
    watcher.join()
    assert 4 * remote.CHUNK < max(sizes) <= cache.max_bytes


def test_a_killed_download_leaves_nothing(store: Any, cache: ShardCache) -> None:
    data = store.put("/a.tar", 6 * remote.CHUNK), store.put("/b.tar", 6 * remote.CHUNK, seed=1)
    expected = [stat(f"{store.url}/{name}.tar") for name in "ab"]
    reached, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 3:
            reached.set()
            go_on.wait(30)

    store.on_get = hold
    process = FORK.Process(target=cache.fetch, args=(f"{store.url}/a.tar", expected[0]))
    process.start()
    assert reached.wait(30)
    (partial,) = cache.dir.glob(".*.part")
    assert partial.stat().st_size == 6 * remote.CHUNK
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    go_on.set()
    assert partial.exists()
    assert cache.fetch(f"{store.url}/b.tar", expected[1]).read_bytes() == data[1]  # both would not fit
    assert not partial.exists()
    assert cache.fetch(f"{store.url}/a.tar", expected[0]).read_bytes() == data[0]
    assert _cached(cache) == ["a.tar"]


def _limit_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, size: int) -> None:
    """The disk of `folder` has room for `size` bytes (of pwrite: a reserved length is a hole)."""
    write = os.pwrite

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        published = sum(path.stat().st_size for path in folder.glob("[!.]*"))
        if published + position + len(data) > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_full_disk(store: Any, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 2, "b": 2, "c": 3, "d": 7}
    data = {name: store.put(f"/{name}.tar", size * remote.CHUNK, size) for name, size in sizes.items()}

    def fetch(name: str) -> Path:
        return cache.fetch(f"{store.url}/{name}.tar", stat(f"{store.url}/{name}.tar"))

    fetch("a")
    fetch("b")
    _limit_disk(monkeypatch, cache.dir, 6 * remote.CHUNK)
    assert fetch("c").read_bytes() == data["c"]
    assert _cached(cache) == ["c.tar"]  # a alone would not have been enough
    with pytest.raises(
        UserError, match=rf"^{cache.dir}: the disk is full, .*/d\.tar needs {7 * remote.CHUNK} bytes; free some"
    ):
        fetch("d")
    assert _cached(cache) == []


def test_a_folder_that_cannot_be_written(store: Any, tmp_path: Path) -> None:
    store.put("/a.tar", 10)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(UserError, match=rf"^{folder}: shards cannot be cached here"):
            ShardCache(CacheConfig(dir=folder)).fetch(f"{store.url}/a.tar", stat(f"{store.url}/a.tar"))


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ShardCache(CacheConfig()).dir == tmp_path / f"mmdit-cache-{os.getuid()}"
    assert ShardCache(CacheConfig()).max_bytes == 100 * 10**9
    with pytest.raises(ValueError, match="greater than 0"):
        CacheConfig(max_gb=0)


# ---- forks


@pytest.mark.parametrize("server", ["store", "bucket"])
def test_parent_and_forked_children_use_a_store_in_turn(
    server: str, request: pytest.FixtureRequest, cache: ShardCache
) -> None:
    """The parent has open connections and an event loop when it forks; neither side may disturb the other's."""
    there = request.getfixturevalue(server)
    data = there.put("/fork.tar" if server == "store" else "fork.tar", 3 * remote.CHUNK)
    url = f"{there.url}/fork.tar" if server == "store" else "s3://shards/fork.tar"
    expected = stat(url)
    began = time.monotonic()

    def child() -> None:
        gc.collect()  # what was the parent's is not cleaned up here
        assert stat(url) == expected
        assert _in_processes(lambda: read_bytes(url, 4 * remote.CHUNK)) == [0]  # a child's child
        assert cache.fetch(url, expected).read_bytes() == data

    assert _in_processes(child, child) == [0, 0]
    assert read_bytes(url, 4 * remote.CHUNK) == data
    assert time.monotonic() - began < remote.SILENCE / 2  # a connection that a child spoilt would be waited for


def test_loader_workers_fetch(store: Any, cache: ShardCache) -> None:
    store.put("/a.tar", 3 * remote.CHUNK)
    url = f"{store.url}/a.tar"
    expected = stat(url)

    class Shards(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[int, int]:
            return len(cache.fetch(url, stat(url)).read_bytes()), os.getpid()

    items = list(DataLoader(Shards(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert [size for size, _ in items] == [3 * remote.CHUNK] * 4
    assert len({pid for _, pid in items} | {os.getpid()}) == 3
    assert stat(url) == expected
    assert len(store.gets()) == 3
