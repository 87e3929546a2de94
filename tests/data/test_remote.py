from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from stack import dist
from stack.config import UserError
from stack.data import remote
from stack.data.remote import ShardCache, Stat, is_remote, list_shards, read_bytes, stat

# ---- finding


@pytest.mark.parametrize("source", ["s3://b/x.tar", "https://h/x", "gs://b", "memory://x", "hf+x.1://a"])
def test_urls_are_remote(source: str) -> None:
    assert is_remote(source)


@pytest.mark.parametrize("source", ["file:///a/b.tar", "/a/b", "a:b.tar", "data/{00..07}.tar", "a/b://c"])
def test_paths_are_not_remote(source: str) -> None:
    assert not is_remote(source)


def test_shards_of_a_web_server(store: Any) -> None:
    for path in ("/a/1.tar", "/a/0.tar", "/a/0.index.npz", "/b/0.tar", "/a/x.tar.gz"):
        store.put(path, 10)
    two = [f"{store.url}/a/0.tar", f"{store.url}/a/1.tar"]
    assert list_shards(f"{store.url}/a") == list_shards(f"{store.url}/a/") == two
    assert list_shards(f"{store.url}/a/[1-9].tar") == two[1:]
    assert list_shards(f"{store.url}/*/0*.tar") == [two[0], f"{store.url}/b/0.tar"]
    assert list_shards(two[1] + "?X-Amz-Signature=abc") == [two[1] + "?X-Amz-Signature=abc"]
    with_user = store.url.replace("://", "://user:pw@")
    assert list_shards(f"{with_user}/b") == [f"{with_user}/b/0.tar"]
    for missing in ("/c/0.tar", "/c", "/a/*.tgz"):
        with pytest.raises(UserError, match=r"no such folder or shard|no \*\.tar there"):
            list_shards(store.url + missing)


def test_shards_of_other_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for folder in ("memory://remote-test", f"file://{tmp_path}"):
        for name in ("0.tar", "1.tar", "1.txt", "sub/2.tar"):
            with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as file:
                file.write(b"x")
        assert [url.rpartition("/")[2] for url in list_shards(folder)] == ["0.tar", "1.tar"]
        assert [stat(url).size for url in list_shards(f"{folder}/?.tar")] == [1, 1]
        assert all("://" in url for url in list_shards(f"{folder}/s*/*.tar"))
        with pytest.raises(UserError):
            list_shards(f"{folder}/none")
    memory.rm("/remote-test", recursive=True)


def test_shards_of_a_bucket(bucket: Any) -> None:
    for key in ("list/b/1.tar", "list/b/0.tar", "list/b/0.txt", "list/c/0.tar"):
        bucket.put(key, 10)
    two = ["s3://shards/list/b/0.tar", "s3://shards/list/b/1.tar"]
    assert list_shards("s3://shards/list/b") == list_shards("s3://shards/list/b/") == two
    assert list_shards("s3://shards/list/?/0.tar") == [two[0], "s3://shards/list/c/0.tar"]
    assert list_shards(two[0]) == two[:1]
    bucket.put("list/b/2.tar", 10)
    assert len(list_shards("s3://shards/list/b")) == 3  # no listing is remembered
    for missing in ("s3://shards/none", "s3://shards/list/b/7.tar", "s3://nowhere/x"):
        with pytest.raises(UserError, match="no such folder or shard"):
            list_shards(missing)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^gs:// needs a package .*: pip install 'mmdit-stack\[gcs\]'$"):
        list_shards("gs://bucket/shards")
    with pytest.raises(UserError, match="unknown protocol 'nope'"):
        list_shards("nope://bucket/shards")
    with pytest.raises(UserError, match="pipe:"):
        list_shards("pipe:curl s3://x")


# ---- stat and read


def test_a_version_tells_of_every_change(store: Any, tmp_path: Path) -> None:
    url = f"{store.url}/a.tar"
    for store.etags in (True, False):
        store.put("/a.tar", 100)
        before = stat(url)
        assert before == stat(url)
        assert before.size == 100
        store.put("/a.tar", 100, seed=1)
        assert stat(url) != before
    path = tmp_path / "a.tar"
    for url in (f"file://{path}", "memory://remote-test/a.tar"):
        seen = set()
        for content in (b"a", b"b"):
            with fsspec.open(url, "wb") as file:
                file.write(content)
            seen |= {stat(url), stat(url)}
        assert len(seen) == 2
        assert all(each.version for each in seen)
    assert stat(f"file://{path}").version == f"mtime {path.stat().st_mtime_ns}"
    fsspec.filesystem("memory").rm("/remote-test", recursive=True)


def test_a_version_in_a_bucket(bucket: Any) -> None:
    bucket.put("v/a.tar", 100)
    before = stat("s3://shards/v/a.tar")
    assert (before, before.size) == (stat("s3://shards/v/a.tar"), 100)
    list_shards("s3://shards/v")  # fills the listings that s3fs keeps
    bucket.put("v/a.tar", 100, seed=1)
    assert stat("s3://shards/v/a.tar").version != before.version
    with pytest.raises(FileNotFoundError):
        stat("s3://shards/v")
    with pytest.raises(FileNotFoundError):
        stat("s3://shards/none.tar")


def test_small_files_are_read_whole_or_not_at_all(store: Any, bucket: Any, tmp_path: Path) -> None:
    data = store.put("/x/manifest.json", 3 * remote.CHUNK)
    (tmp_path / "manifest.json").write_bytes(data)
    key = bucket.put("x/manifest.json", 3 * remote.CHUNK)
    for folder in (f"{store.url}/x", f"file://{tmp_path}", "s3://shards/x"):
        for store.ranges in (True, False):
            assert read_bytes(f"{folder}/manifest.json", len(data)) == data == key
            with pytest.raises(UserError, match=f"larger than the {len(data) - 1} bytes"):
                read_bytes(f"{folder}/manifest.json", len(data) - 1)
            assert read_bytes(f"{folder}/none.json", 10) is None
    store.put("/x/empty", 0)
    assert read_bytes(f"{store.url}/x/empty", 10) == b""


def test_proxy_and_credentials_come_from_outside(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("/a.tar", 1)
    stat(store.url.replace("://", "://user:pw@") + "/a.tar")
    headers = {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}}
    monkeypatch.setitem(fsspec.config.conf, "http", headers)
    stat(f"{store.url}/a.tar")
    assert store.authorizations == ["Basic dXNlcjpwdw==", "Bearer token"]
    monkeypatch.setenv("http_proxy", store.url)
    monkeypatch.setenv("no_proxy", "")
    store.put("http://elsewhere.invalid/a.tar", 7)
    assert stat("http://elsewhere.invalid/a.tar").size == 7


def test_a_bucket_without_credentials(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket.put("public/a.tar", 10)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 9}})  # another instance
    with pytest.raises(PermissionError, match=r"access denied; credentials come from .* \(Unable to locate"):
        stat("s3://shards/public/a.tar")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert stat("s3://shards/public/a.tar").size == 10


# ---- failures


@pytest.mark.parametrize("status", [503, 500, 429, "drop"])
def test_a_passing_failure_costs_a_line(
    store: Any, cache: ShardCache, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    data = store.put("/a.tar", 3 * remote.CHUNK)
    expected = stat(f"{store.url}/a.tar")
    store.failures["GET"].extend([status] * 3)
    assert cache.fetch(f"{store.url}/a.tar", expected).read_bytes() == data
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{store.url}/a.tar: ") for line in lines)
    assert "attempt 2 of 6" in lines[0]
    assert "attempt 4 of 6" in lines[2]
    assert status == "drop" or f"HTTP {status}" in lines[0]


def test_a_broken_connection_goes_on_where_it_stopped(store: Any, cache: ShardCache) -> None:
    data = store.put("/a.tar", 3 * remote.CHUNK + 5)
    expected = stat(f"{store.url}/a.tar")
    store.on_get = lambda number: store.failures["GET"].append("drop") if number == 3 else None
    assert cache.fetch(f"{store.url}/a.tar", expected).read_bytes() == data
    spans = [f"{start}-{min(start + remote.CHUNK, len(data)) - 1}" for start in range(0, len(data), remote.CHUNK)]
    assert store.gets() == [*spans[:3], spans[2], spans[3]]


def test_stat_and_listing_are_tried_again(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store.put("/a/0.tar", 10)
    for call in (lambda: stat(f"{store.url}/a/0.tar").size, lambda: len(read_bytes(f"{store.url}/a/0.tar", 99) or b"")):
        for method in ("GET", "HEAD"):  # fsspec asks by GET where HEAD fails, and tells of any failure as "not found"
            store.failures[method].extend([503] * 2)
        assert call() == 10
        assert len(capsys.readouterr().err.splitlines()) == 2
    store.failures["GET"].extend([503] * 2)
    assert list_shards(f"{store.url}/a") == [f"{store.url}/a/0.tar"]
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("call", [stat, list_shards, lambda url: read_bytes(url, 10)])
def test_a_lasting_failure_ends_in_one_line(store: Any, call: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    store.fail(*[503] * 99)
    with pytest.raises(OSError, match=r"HTTP 503; given up after 6 attempts") as caught:
        call(f"{store.url}/a.tar")
    assert type(caught.value) is OSError
    assert "\n" not in str(caught.value)
    assert len(capsys.readouterr().err.splitlines()) == remote.ATTEMPTS - 1


@pytest.mark.usefixtures("store")
def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    dead = f"http://127.0.0.1:{dist.free_port()}"
    for source in ("/a.tar", "/a", "/*/b.tar"):
        with pytest.raises(OSError, match=r"onnect.*; given up after 6 attempts"):
            list_shards(dead + source)
        assert len(capsys.readouterr().err.splitlines()) == remote.ATTEMPTS - 1


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)])
def test_what_cannot_pass_is_not_tried_again(
    store: Any, cache: ShardCache, status: int, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    store.fail(*[status] * 99)
    with pytest.raises(kind):
        stat(f"{store.url}/a.tar")
    with pytest.raises(UserError if status == 404 else kind):
        cache.fetch(f"{store.url}/a.tar", Stat(10, "x"))
    assert len(store.requests) == 4  # HEAD and GET each
    assert capsys.readouterr().err == ""
    assert list(cache.dir.iterdir()) == []


@pytest.mark.parametrize("failures", [0, 2])
def test_a_server_without_ranges(store: Any, cache: ShardCache, failures: int) -> None:
    data = store.put("/a.tar", 4 * remote.CHUNK)
    store.ranges = False
    expected = stat(f"{store.url}/a.tar")
    store.on_get = lambda number: store.failures["GET"].append("drop") if 3 <= number < 3 + failures else None
    assert cache.fetch(f"{store.url}/a.tar", expected).read_bytes() == data
    assert len(store.gets()) == 3 + failures  # the first chunk, the second that was refused, the whole


@pytest.mark.parametrize("failures", [0, 2])
def test_a_server_that_says_it_has_no_ranges(store: Any, cache: ShardCache, failures: int) -> None:
    data = store.put("/a.tar", 4 * remote.CHUNK)
    store.ranges, store.headers = False, {"Accept-Ranges": "none"}
    expected = stat(f"{store.url}/a.tar")
    store.failures["GET"].extend(["drop"] * failures)
    assert cache.fetch(f"{store.url}/a.tar", expected).read_bytes() == data
    assert store.gets().count("") == len(store.gets())


def test_a_bucket_that_fails_at_times(
    bucket: Any, cache: ShardCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = bucket.put("f/a.tar", 3 * remote.CHUNK + 5)
    url = "s3://shards/f/a.tar"
    bucket.failures["HEAD"].extend([503, 500])
    expected = stat(url)
    bucket.failures["GET"].extend([503, "drop", 500])
    assert cache.fetch(url, expected).read_bytes() == data
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # the retries of s3fs and botocore are off
    assert all(line.startswith(f"{url}: ") for line in lines)
    assert bucket.gets().count(f"0-{remote.CHUNK - 1}") == 4
    for status, kind in [(403, PermissionError), (503, OSError)]:
        bucket.failures["HEAD"].extend([status] * 6)
        with pytest.raises(kind, match=r"access denied|HTTP 503; given up after 6") as caught:
            stat(url)
        assert type(caught.value) is kind
        bucket.failures["HEAD"].clear()
    bucket.failures["GET"].extend([503])
    assert list_shards("s3://shards/f") == [url]


def test_secrets_are_never_told(store: Any, cache: ShardCache, capsys: pytest.CaptureFixture[str]) -> None:
    store.put("/a.tar", remote.CHUNK)
    url = f"{store.url}/a.tar?X-Amz-Signature=SECRET".replace("://", "://user:SECRET@")
    expected = stat(url)
    store.failures["GET"].extend([503, "drop"])
    cache.fetch(url, expected)
    told = [capsys.readouterr().err]
    assert "http://***@127.0.0.1" in told[0]
    assert "/a.tar?***: HTTP 503" in told[0]
    gone, folder = url.replace("a.tar", "b.tar"), url.replace("a.tar", "a")
    store.failures["GET"].extend([503] * 99)
    for call in (
        lambda: cache.fetch(url, expected._replace(version="other")),
        lambda: cache.fetch(url, expected._replace(size=10**9)),
        lambda: read_bytes(url, 10),
        lambda: list_shards(folder),
        store.failures["GET"].clear,
        lambda: stat(gone),
        lambda: list_shards(gone),
        lambda: list_shards(folder),
        lambda: list_shards(url + "$(id)"),
        lambda: list_shards(url.replace("http", "nope")),
        lambda: read_bytes(url, 1),
        lambda: store.fail(*[403] * 2),
        lambda: stat(url),
    ):
        try:
            call()
        except (UserError, OSError) as error:
            told += traceback.format_exception(error)
        told.append(capsys.readouterr().err)
    assert sum("***" in text for text in told) > 10
    assert not [text for text in told if "SECRET" in text]
    assert not [path for path in cache.dir.iterdir() if b"SECRET" in path.read_bytes()[: remote.CHUNK]]
