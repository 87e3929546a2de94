from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from stack.config import UserError
from stack.data import layout, safety
from stack.data.safety import DecodeError, RejectLog
from stack.shown import redact


@pytest.mark.parametrize(
    "source", ["pipe:cat x.tar", "a.tar::b.tar", "data/${HOME}/x.tar", "data/$(id).tar", "data/`id`.tar"]
)
def test_shell_and_chained_sources_are_refused(source: str) -> None:
    with pytest.raises(UserError):
        safety.check_source(source)


def test_plain_sources_pass() -> None:
    for source in ["data/{00000..00007}.tar", "/a/b", "s3://bucket/x.tar", "pipes/a:b.tar"]:
        safety.check_source(source)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host/a.tar?X-Amz-Signature=abc", "https://***@host/a.tar?***"),
        ("s3://key:p@ss@bucket/a@b.tar", "s3://***@bucket/a@b.tar"),
        (
            "HTTP 503 for https://h/a?b=c, url='http://t@h/x?y=z'",
            "HTTP 503 for https://h/a?***, url='http://***@h/x?***",
        ),
        ("no URL: a@b.c? yes, why://not", "no URL: a@b.c? yes, why://not"),
        ("https://h:80/a.tar is gone", "https://h:80/a.tar is gone"),
    ],
)
def test_urls_are_shown_without_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def test_a_refused_source_is_shown_without_secrets() -> None:
    with pytest.raises(UserError, match=r"^'https://\*\*\*@h/a::b'"):
        safety.check_source("https://user:pw@h/a::b")


@pytest.mark.parametrize("name", ["a.pkl", "a.npy.PTH", "b/a.pt", "a.pyd", "a.pickle"])
def test_names_that_run_code_are_refused(name: str) -> None:
    assert safety.refuse_name(name).startswith("forbidden member")


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "b/../a.png", "b\\..\\a.png", "C:\\a.png", "\\a.png"])
def test_paths_outside_are_refused(name: str) -> None:
    assert safety.refuse_name(name) == "path outside the archive"


def test_harmless_names_pass() -> None:
    assert not any(map(safety.refuse_name, ["a.png", "./a.png", "b/a..png", "s:1.png", "a.seg.png"]))


def test_split_name_is_webdataset_s() -> None:
    assert safety.split_name("./x/0001.JPG") == ("x/0001", "jpg")
    assert safety.split_name("././/./x/0001.JPG") == ("x/0001", "jpg")
    assert safety.split_name("x.y/0001.seg.png") == ("x.y/0001", "seg.png")
    assert safety.split_name("README") == ("README", "")


def _png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width × height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_from_the_header() -> None:
    assert safety.open_image(_png_of(8192, 8192)).size == (8192, 8192)
    for size in [(8193, 8192), (12000, 12000), (60000, 60000)]:
        with pytest.raises(DecodeError):
            safety.open_image(_png_of(*size))


def test_other_image_formats_are_refused_whatever_they_are_called() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "BMP")
    with pytest.raises(DecodeError) as error:
        safety.open_image(stream.getvalue())
    assert "0x" not in str(error.value)


def test_layout_of_a_pre_encoded_sample() -> None:
    latent = torch.zeros(4, 2, 3)
    tensors = {"latent_mean": latent, "latent_logvar": latent + 1, "pooled": torch.zeros(9), "pooled.1": torch.zeros(9)}
    data = save({**tensors, "t5": torch.zeros(7, 8, dtype=torch.bfloat16), "t5.1": torch.zeros(5, 8)})
    header = data[: layout.header_bytes(data[:8])]
    found = layout.parse(header)
    assert (found.latent, found.caption_lengths, found.size) == ((3, 2), [7, 5], len(data))
    for name, shape in {"latent_mean": (4, 2, 3), "t5": (7, 8), "pooled.1": (9,)}.items():
        assert found.slots[name].shape == shape
    for broken in [
        header[:-20],
        b"",
        b"\xff" * 64,
        header.replace(b"[4,2,3]", b"[4,2,q]"),
        header.replace(b"F32", b"I32"),
    ]:
        with pytest.raises(DecodeError):
            layout.parse(broken)


def test_reject_log_appends(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rejected.jsonl"
    first, second = RejectLog(path), RejectLog(path)
    first.add("00000.tar", "a", "image not readable: bad byte 3")
    first.add("00000.tar", "b", "image not readable: bad byte 4")
    second.add("00001.tar", "ä\udcff", "no caption")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[2] == {"shard": "00001.tar", "key": "ä\udcff", "reason": "no caption"}


def test_lines_that_cannot_be_written_now_are_written_later(tmp_path, capsys):
    """By the process that has met the samples, which counts them all the same."""
    folder = tmp_path / "run"
    folder.touch()  # no folder can be made here
    log = RejectLog(folder / "rejected.jsonl")
    assert log.add("a.tar", "1", "image too large")
    assert log.add("a.tar", "2", "image too large")
    assert not log.add("a.tar", "1", "image too large")
    assert [rejected.key for rejected in log.broken] == ["1", "2"]
    assert capsys.readouterr().err.count("cannot be written") == 1
    folder.unlink()
    assert log.add("a.tar", "3", "image too large")
    assert log.add("a.tar", "4", "image too large")
    other = RejectLog(folder / "rejected.jsonl")
    other.read()
    assert [rejected.key for rejected in other.broken] == ["1", "2", "3", "4"]


DAMAGED = ["7", "null", "[]", "{", '{"shard": "a"}', '{"shard": [], "key": "1", "reason": "x"}']
DAMAGED += ['{"shard": "a", "key": 1, "reason": "x"}', '{"shard": "a", "key": "1", "reason": 2}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_rejected_samples_counts_for_nothing(tmp_path, line):
    path = tmp_path / "rejected.jsonl"
    path.write_text(f'{line}\n{{"shard": "a.tar", "key": "1", "reason": "image too large"}}\n')
    log = RejectLog(path)
    log.read()
    assert [rejected.key for rejected in log.broken] == ["1"]
