"""Shards made of bytes, harmless and hostile; a web server and an S3 bucket that can be told to fail; a small cache."""

from __future__ import annotations

import http.client
import io
import json
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from stack.data import remote

Members = Iterable[tuple[str, bytes]]


def pack(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def picture(number: int = 0, form: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    """An image of one colour that tells its number, 0 … 15."""
    stream = io.BytesIO()
    Image.new("RGB", size, (16 * number, 255 - 16 * number, 128)).save(stream, form)
    return stream.getvalue()


def sample(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    """A sample whose image, caption and JSON all tell its number."""
    caption = f"a picture of number {number}"
    return [
        (f"{key}.png", picture(number)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"caption": caption, "number": number}).encode()),
    ]


@pytest.fixture(name="pack", scope="session")
def _pack() -> Callable[..., Path]:
    return pack


@pytest.fixture(name="picture", scope="session")
def _picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture(name="sample", scope="session")
def _sample() -> Callable[..., list[tuple[str, bytes]]]:
    return sample


def listed(path: Path) -> dict[str, str]:
    """key → reason of a rejected.jsonl, whose every line is what it should be."""
    found = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        entry = json.loads(line)
        assert entry.keys() == {"shard", "key", "reason"}
        assert all(isinstance(value, str) for value in entry.values())
        found[entry["key"]] = entry["reason"]
    return found


@pytest.fixture(name="listed", scope="session")
def _listed() -> Callable[[Path], dict[str, str]]:
    return listed


class Store(ThreadingHTTPServer):
    """A web server over `files`."""

    daemon_threads = True
    upstream = 0  # port of the server that this one stands in front of

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.changes: dict[str, int] = {}  # path → times its content was changed
        self.reset()

    def reset(self) -> None:
        self.requests: list[tuple[str, str, str]] = []  # (method, path, range)
        self.authorizations: list[str] = []
        # What to answer next instead, used up one a request: a status, or a body that breaks off in the middle.
        self.failures: dict[str, deque[int | Literal["drop"]]] = {"GET": deque(), "HEAD": deque()}
        self.ranges = self.etags = self.times = True
        self.headers: dict[str, str] = {}  # further ones of every file
        self.on_get: Callable[[int], object] = lambda number: None  # called before the answer to the nth GET

    @property
    def root(self) -> str:
        """The URL of the path "/"."""
        return self.url

    def put(self, path: str, size: int, seed: int = 0) -> bytes:
        data = np.random.default_rng(seed).bytes(size)
        self.add(path, data)
        return data

    def add(self, path: str, data: bytes) -> None:
        self.files[path] = data
        self.changes[path] = self.changes.get(path, 0) + 1

    def gets(self) -> list[str]:
        """The ranges of all GET requests so far."""
        return [span for method, _, span in self.requests if method == "GET"]

    def fail(self, *answers: int | Literal["drop"]) -> None:
        for queue in self.failures.values():
            queue.extend(answers)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no news
            super().handle_error(request, client_address)


class Bucket(Store):
    """s3://shards, served by moto."""

    def __init__(self, port: int) -> None:
        import boto3

        super().__init__()
        self.upstream = port
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        self.client.create_bucket(Bucket="shards")

    @property
    def root(self) -> str:
        return "s3://shards"

    def add(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket="shards", Key=path.removeprefix("/"), Body=data, ACL="public-read")


class _Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes

    def do_GET(self) -> None:
        store, path = self.server, self.path.partition("?")[0]
        span = self.headers.get("Range", "").removeprefix("bytes=")
        store.requests.append((self.command, path, span))
        store.authorizations.append(self.headers.get("Authorization", ""))
        if self.command == "GET":
            store.on_get(len(store.gets()))
        failures = store.failures[self.command]
        failure = failures.popleft() if failures else None
        if isinstance(failure, int):
            self._answer(failure, {}, b"not now")
        elif store.upstream:
            self._answer(*self._forward(), drop=failure == "drop")
        elif path.endswith("/"):
            self._answer(200, {"Content-Type": "text/html"}, self._page(path).encode())
        elif path not in store.files:
            self._answer(404, {}, b"")
        else:
            self._answer(*self._file(path, span), drop=failure == "drop")

    do_HEAD = do_GET

    def _page(self, folder: str) -> str:
        inside = {path.removeprefix(folder) for path in self.server.files if path.startswith(folder)}
        names = sorted({name + slash for name, slash, _ in (path.partition("/") for path in inside)})
        links = ["?C=N;O=D", "../", "../elsewhere/0.tar", *names[::2], *(f"./{name}" for name in names[1::2])]
        return "".join(f'<a href="{link}">{link}</a>' for link in links)

    def _file(self, path: str, span: str) -> tuple[int, dict[str, str], bytes]:
        store = self.server
        headers = dict(store.headers)
        if store.times:
            headers["Last-Modified"] = f"Mon, 01 Jan 2024 00:00:{store.changes[path]:02} GMT"
        if store.etags:
            headers["ETag"] = f'"{store.changes[path]}"'
        body = store.files[path]
        if not (store.ranges and span):
            return 200, headers, body
        first, last = map(int, span.split("-"))
        last = min(last, len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return 206, headers, body[first : last + 1]

    def _forward(self) -> tuple[int, dict[str, str], bytes]:
        there = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        there.request(self.command, self.path, headers=dict(self.headers))
        answer = there.getresponse()
        body = answer.read()
        there.close()
        own = ("connection", "server", "date")
        return answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in own}, body

    def _answer(self, status: int, headers: dict[str, str], body: bytes, drop: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if drop else body)
            self.close_connection |= drop

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def _serving(store: Store) -> Iterator[None]:
    thread = threading.Thread(target=store.serve_forever, args=(0.02,))
    thread.start()
    yield
    store.shutdown()
    store.server_close()
    thread.join()


@pytest.fixture
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "CHUNK", 2**16)
    monkeypatch.setattr(remote, "_POLL", 0.02)


@pytest.fixture
def store(_small_and_quick: None) -> Iterator[Store]:
    store = Store()
    with _serving(store):
        yield store


@pytest.fixture(scope="session")
def _moto() -> Iterator[Bucket]:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        bucket = Bucket(moto.get_host_and_port()[1])
        patch.setenv("AWS_ENDPOINT_URL", bucket.url)
        with _serving(bucket):
            yield bucket
    moto.stop()


@pytest.fixture
def bucket(_moto: Bucket, _small_and_quick: None) -> Bucket:
    _moto.reset()
    return _moto


@pytest.fixture(params=["http", "s3"])
def either(request: pytest.FixtureRequest) -> Store:
    """The web server, or the bucket."""
    found: Store = request.getfixturevalue({"http": "store", "s3": "bucket"}[request.param])
    return found


@pytest.fixture
def cache(tmp_path: Path, _small_and_quick: None) -> remote.ShardCache:
    """Room for ten chunks."""
    return remote.ShardCache(remote.CacheConfig(dir=tmp_path / "cache", max_gb=10 * remote.CHUNK / 1e9))
