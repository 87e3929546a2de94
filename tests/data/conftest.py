"""Shards made of bytes, harmless and hostile."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

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
