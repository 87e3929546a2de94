"""Members that ask for more memory or time than they have bytes: never more than 300 MB beyond a harmless shard's, nor
20 seconds."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stack.data.index import build_index

ROOT = Path(__file__).parents[2]
MOST_MB = 300
MOST_SECONDS = 20

# Everything that is done with a shard before training or encoding: index it, read its members, decode and cut them.
READ = """
import json, re, sys, time, warnings
from stack.data import layout
from stack.data.images import decode_image, to_bucket
from stack.data.index import build_index
from stack.data.safety import DecodeError
warnings.simplefilter("ignore")
began, index, kept, broken = time.process_time(), build_index(sys.argv[1]), {}, {}
with open(sys.argv[1], "rb") as file:
    def read(row, extension):
        offset, length = index.span(row, extension)
        file.seek(offset)
        return file.read(length)
    for row, key in enumerate(index.keys):
        try:
            if index.has(row, "safetensors"):
                layout.parse(read(row, "safetensors"))
            else:
                kept[key] = to_bucket(decode_image(read(row, index.image_extension(row))), (8, 8)).mean((0, 1)).tolist()
        except DecodeError as error:
            broken[key] = str(error)
mb = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"mb": mb, "s": time.process_time() - began, "kept": kept, "damage": index.damage,
                  "broken": {**dict(index.rejected), **broken}}))
"""


def measure(code: str, *arguments: object) -> Any:
    """What a process of its own prints. Its largest resident memory is the kernel's VmHWM: what getrusage tells begins
    with that of the process that started it, and pytest may have grown."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def png(*chunks: bytes, width: int = 8, height: int = 8, pixels: bytes | None = None, behind: bytes = b"") -> bytes:
    """A grey PNG with these chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8 if width < 9 else 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((1 + width) * height)) if pixels is None else pixels
    ihdr, idat, iend = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(chunks) + idat + behind + iend


def jpeg(**options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("L", options.pop("size", (8, 8)), 128).save(stream, "JPEG", **options)
    return stream.getvalue()


def webp(width: int, height: int) -> bytes:
    """An animation's header, one tiny frame, and a canvas of this size."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "WEBP", lossless=True)
    still = stream.getvalue()[12:]
    frame = bytes(6) + struct.pack("<I", 7)[:3] * 2 + bytes(4) + still
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def segments(marker: bytes, head: bytes, count: int) -> bytes:
    """A JPEG with so many application segments of 64 kB."""
    one = b"\xff" + marker + struct.pack(">H", 65535) + head + b"x" * (65533 - len(head))
    data = jpeg()
    return data[:2] + one * count + data[2:]


def scans(count: int) -> bytes:
    """A progressive JPEG of 16 megapixels that goes over them again and again."""
    data = jpeg(size=(4096, 4096), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def frames(count: int) -> bytes:
    """An animated PNG."""
    control = struct.pack(">IIIIHHBB", 8, 8, 0, 0, 1, 10, 0, 0)
    pixels, number, parts = zlib.compress(bytes(72)), 1, []
    for _ in range(count):
        parts.append(chunk(b"fcTL", struct.pack(">I", number) + control))
        parts.append(chunk(b"fdAT", struct.pack(">I", number + 1) + pixels))
        number += 2
    first = chunk(b"acTL", struct.pack(">II", count + 1, 0)) + chunk(b"fcTL", struct.pack(">I", 0) + control)
    return png(first, pixels=pixels, behind=b"".join(parts))


def animated_webp(count: int) -> bytes:
    stream = io.BytesIO()
    images = [Image.new("RGB", (8, 8), (n % 256, n // 256, 0)) for n in range(count)]
    images[0].save(stream, "WEBP", save_all=True, append_images=images[1:], lossless=True, method=0)
    return stream.getvalue()


def exif(*entries: tuple[int, int, int, int], next_ifd: int = 8) -> bytes:
    """(tag, type, count, value) as a block whose directory leads back to itself."""
    table = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + table + struct.pack(">I", next_ifd)


def header(data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(data) if length is None else length) + data


TEXT = b"key\0\0"
SIDES = json.dumps({"t5": {"dtype": "F32", "shape": [2**31 - 1] * 80_000, "data_offsets": [0, 4]}}).encode()
ITEXT = b"key\0\1\0\0\0"
XMP = b"XML:com.adobe.xmp\0\1\0\0\0"
# name → (extension, bytes, how the reason begins; None where the image is as it should be)
BOMBS: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "144 megapixels in 17 kB": (
        "png",
        lambda: png(width=12000, height=12000, pixels=zlib.compress(bytes(1501 * 12000), 9)),
        "image too large: 12000×12000 pixels",
    ),
    "PNG of 2 gigapixels": ("png", lambda: png(width=46340, height=46340, pixels=b""), "image not readable"),
    "PNG with a text of 128 MB": ("png", lambda: png(chunk(b"zTXt", TEXT + zeros(128))), None),
    "PNG with an international text of 128 MB": (
        "png",
        lambda: png(chunk(b"iTXt", ITEXT + zeros(128))),
        None,
    ),
    "PNG with a colour profile of 128 MB": ("png", lambda: png(chunk(b"iCCP", TEXT + zeros(128))), None),
    "PNG with 500 texts of 1 MB": (
        "png",
        lambda: png(*[chunk(b"zTXt", b"%d\0\0" % n + zeros(1)) for n in range(500)]),
        None,
    ),
    "PNG with 40 profiles of 16 MB": ("png", lambda: png(*[chunk(b"iCCP", TEXT + zeros(16))] * 40), None),
    "PNG with 40 XMP of 128 MB": ("png", lambda: png(*[chunk(b"iTXt", XMP + zeros(128))] * 40), None),
    "PNG with 50 MB before its pixels": ("png", lambda: png(chunk(b"prIv", bytes(50 * 2**20))), "image too large: 52"),
    "PNG with 50 MB behind its pixels": (
        "png",
        lambda: png(behind=chunk(b"prIv", bytes(50 * 2**20))),
        "image too large: 52",
    ),
    "PNG with 300,000 chunks": ("png", lambda: png(behind=chunk(b"prIv", b"") * 300_000), None),
    "PNG whose pixels go on for 128 MB": ("png", lambda: png(pixels=zeros(128)), None),
    "animated PNG of 5,000 frames": ("png", lambda: frames(5000), None),
    "JPEG of 4 gigapixels": (
        "jpg",
        lambda: (lambda data: data.replace(b"\0\x08\0\x08", b"\xff\xdc\xff\xdc", 1))(jpeg()),
        "image not readable",
    ),
    "JPEG with 60 MB of EXIF": ("jpg", lambda: segments(b"\xe1", b"Exif\0\0", 900), "image not readable"),
    "JPEG with 60 MB of colour profile": ("jpg", lambda: segments(b"\xe2", b"ICC_PROFILE\0", 900), "image not"),
    "JPEG of 2,000 scans": ("jpg", lambda: scans(2000), "image not decodable: more than 128 scans"),
    "JPEG of 2,000 scans behind a thumbnail's end": (
        "jpg",
        lambda: (lambda data: data[:2] + b"\xff\xe1\0\x06\xff\xd9\xff\xd9" + data[2:])(scans(2000)),
        "image not decodable: more than 128 scans",
    ),
    "EXIF of four thousand million values": ("jpg", lambda: jpeg(exif=exif((0x112, 3, 2**32 - 1, 8))), None),
    "EXIF that leads to itself": ("jpg", lambda: jpeg(exif=exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8))), None),
    "WebP of 268 megapixels": ("webp", lambda: webp(16383, 16383), "image "),
    "WebP canvas of 4 gigapixels": ("webp", lambda: webp(65535, 65535), "image "),
    "animated WebP of 3,000 frames": ("webp", lambda: animated_webp(3000), None),
    "safetensors header of 2^60 bytes": ("safetensors", lambda: header(b"{}", 2**60), "safetensors not readable"),
    "100 MB of safetensors header": ("safetensors", lambda: header(b"{}" + b" " * 10**8), "safetensors not readable"),
    "safetensors header nested a million deep": (
        "safetensors",
        lambda: header(b'{"a":' * 200_000),
        "safetensors not readable",
    ),
    "safetensors of 80,000 sides": ("safetensors", lambda: header(SIDES), "safetensors not readable: t5 is F32"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pack, sample) -> dict[str, Any]:
    """The same with nothing but a harmless sample."""
    return measure(READ, pack(tmp_path_factory.mktemp("plain") / "x.tar", sample("good", 3)))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_its_sample_and_no_memory(name, plain, tmp_path, pack, sample):
    extension, make, reason = BOMBS[name]
    hostile = {**dict(sample("bomb", 1)), f"bomb.{extension}": make()}
    if extension != "png":
        del hostile["bomb.png"]
    found = measure(READ, pack(tmp_path / "x.tar", [*sample("good", 3), *hostile.items()], tarfile.GNU_FORMAT))
    assert found["mb"] - plain["mb"] < MOST_MB
    assert found["s"] < MOST_SECONDS
    assert found["kept"]["good"] == plain["kept"]["good"]
    if reason is None:
        assert found["broken"] == {}
        assert set(found["kept"]) == {"good", "bomb"}
    else:
        assert list(found["broken"]) == ["bomb"]
        assert found["broken"]["bomb"].startswith(reason), found["broken"]


def sparse(path: Path, members: list[tuple[str, bytes, int]]) -> Path:
    """A tar of (name, first bytes, size) whose members go on with zeros that take no disk."""
    with path.open("wb") as file:
        for name, data, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(data)
            file.seek(-(-size // 512) * 512 - len(data), io.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    return path


def test_members_of_gigabytes_are_not_read(plain, tmp_path, sample):
    good = [(name, data, len(data)) for name, data in sample("good", 3)]
    (_, picture), (_, text), _ = sample("bomb", 1)
    for extension, data, caption in [("png", picture, text), ("webp", webp(8, 8), text), ("png", picture, b"long ")]:
        image_size, text_size = (2**30, len(text)) if caption is text else (len(data), 2**30)
        bomb = [(f"bomb.{extension}", data, image_size), ("bomb.txt", caption, text_size)]
        found = measure(READ, sparse(tmp_path / "x.tar", [*good, *bomb]))
        if caption is text:
            assert (list(found["kept"]), list(found["broken"]), found["damage"]) == (["good"], ["bomb"], "")
            assert "too large" in found["broken"]["bomb"]
        else:  # the image may be used without its caption, which is not read
            assert (list(found["kept"]), list(found["broken"]), found["damage"]) == (["good", "bomb"], [], "")
            assert "caption too large" in build_index(tmp_path / "x.tar").bad_captions[1]
        assert found["mb"] - plain["mb"] < 30
        assert found["s"] < 5


def test_extended_headers_of_gigabytes_are_not_read(plain, tmp_path, sample):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        members = [*sample("good", 3), *sample("fine", 4)]
        path = sparse(tmp_path / "x.tar", [(name, data, len(data)) for name, data in members])
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, 2**30
        with path.open("r+b") as file:
            file.seek(-1024, io.SEEK_END)
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(file.tell() + 2**30 + 2048)
        found = measure(READ, path)
        assert (list(found["kept"]), "extended header of 1073741824 bytes" in found["damage"]) == (
            ["good", "fine"],
            True,
        )
        assert found["mb"] - plain["mb"] < 30


def test_a_compressed_tar_is_damage_and_is_never_unpacked(plain, tmp_path):
    """A gzip of 128 MB of zeros in 1 MB."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    (tmp_path / "x.tar").write_bytes(b"".join(packer.compress(bytes(2**20)) for _ in range(128)) + packer.flush())
    found = measure(READ, tmp_path / "x.tar")
    assert (found["kept"], found["damage"].partition(":")[0]) == ({}, "not a tar but compressed with gzip")
    assert found["mb"] - plain["mb"] < 30


# Captions out of JSON, as pre-encoding reads them.
CAPTIONS = """
import json, re, sys
from stack.data.index import build_index
from stack.data.safety import DecodeError
from stack.data.shards import ShardReader
from stack.preencode.pipeline import _captions
mb, broken = [], {}
for path in sys.argv[1:]:
    reader = ShardReader([build_index(path)])
    for row, key in enumerate(reader.indices[0].keys):
        try:
            assert _captions({"a": "json.caption"}, reader, 0, row) == ["a picture of number 3"]
        except DecodeError as error:
            broken[key] = str(error)
    mb.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
print(json.dumps({"mb": mb, "broken": broken}))
"""


def test_json_of_a_gigabyte_and_of_any_depth_costs_its_sample_and_no_memory(tmp_path, sample):
    members = [(name, data, len(data)) for name, data in sample("good", 3)]
    plain = sparse(tmp_path / "plain.tar", members)
    for key, data, size in [
        ("gigabyte", b"[" * 2**20, 2**30),
        ("deep", b"[" * 10**6, 10**6),
        ("deeper", b'{"caption":' * 90_000, 90_000 * 11),
        ("wide", b"[" + b"{}," * 300_000 + b"{}]", 900_004),
        ("digits", b'{"caption": ' + b"9" * 10**6 + b"}", 10**6 + 13),
        ("long", b'{"caption": "' + b"long " * 20_000 + b'"}', 100_015),
        ("half", b'{"caption": "\\ud800"}', 21),
    ]:
        members += [(name, content, len(content)) for name, content in sample(key, 1)[:2]]
        members += [(f"{key}.json", data, size)]
    found = measure(CAPTIONS, plain, sparse(tmp_path / "x.tar", members))
    assert {key: reason.partition(":")[0] for key, reason in found["broken"].items()} == {
        "gigabyte": "JSON too large",
        "deep": "JSON not readable",
        "deeper": "JSON not readable",
        "wide": "no caption",
        "digits": "JSON not readable",
        "long": "caption too large",
        "half": "caption not UTF-8",
    }
    assert found["mb"][1] - found["mb"][0] < MOST_MB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_commands_leave_bombs_out_and_go_on(mmdit, stage, tmp_path, pack, sample, listed):
    """In one shard, through indexing, pre-encoding and training."""
    slow = ("MB", "scans")
    cheap = [name for name, (*_, reason) in BOMBS.items() if reason and not any(word in name for word in slow)]
    members = [member for number in range(12) for member in sample(f"good{number}", number)]
    for number, name in enumerate(cheap):
        extension, make, _ = BOMBS[name]
        hostile = {**dict(sample(f"bomb{number}", 1)), f"bomb{number}.{extension}": make()}
        if extension != "png":
            del hostile[f"bomb{number}.png"]
        members += hostile.items()
    pack(tmp_path / "shards" / "x.tar", members)
    bombs = {f"bomb{number}" for number in range(len(cheap))}
    done = mmdit("data", "index", tmp_path / "shards")
    assert (done.returncode, f"12 samples, {len(cheap)} left out" in done.stdout) == (0, True)
    options = (f"source={tmp_path}/shards", f"out={tmp_path}/out", "max_rejected=0.9")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path / "out" / "rejected.jsonl").keys() == bombs
    options = (f"run.dir={tmp_path}/run", f"data.source={tmp_path}/shards", "data.max_rejected=0.9", "schedule.steps=1")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path / "run" / "rejected.jsonl").keys() == bombs
