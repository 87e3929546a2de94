"""PNG files, reduced to the chunks that make the pixels before Pillow reads them.

Pillow unpacks every text and profile chunk, and refuses the whole image if one of them has more than 1 MB. It also
reads the chunks behind the pixels only after it has decoded the pixels, which is too late for an index. Here the few
chunks that describe colour and orientation are read wherever they are, and all others are skipped.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from PIL import Image

MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_UNPACKED = 2**24
"""Bytes of a profile or text after decompression; a larger one is not used."""

_MAX_CHUNK = 2**24  # bytes of a chunk beside the pixels that is read for the size alone
_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT"})
_COLOURS = frozenset({b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"cICP"})
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ANYWHERE = _TEXTS | {b"eXIf", b"IDAT"}
_BEFORE_PIXELS = _PIXELS | _COLOURS | _ANYWHERE
_KEPT_TEXTS = {  # keyword → key of `info`, as Pillow names them
    b"exif": "exif",
    b"Raw profile type exif": "Raw profile type exif",
    b"Raw profile type APP1": "Raw profile type APP1",
    b"XML:com.adobe.xmp": "XML:com.adobe.xmp",
}
_is_name = re.compile(rb"\w{4}").fullmatch
_BAND = 64  # rows of 16-bit samples that are converted at once


class DamagedError(ValueError):
    """A chunk of a PNG is cut off, or its check sum is wrong."""


def open_png(file: IO[bytes], pixels: bool) -> Image.Image:
    """Open a PNG with Pillow. Its pixels can only be loaded if `pixels` is true; they are skipped otherwise.

    `info` has Pillow's keys for colour and orientation: icc_profile, gamma, chromaticity, srgb, transparency, exif,
    "XML:com.adobe.xmp", "Raw profile type exif". It also has cicp, "Raw profile type APP1", depth (bits per sample),
    grey (whether the samples are grey), and unread (names of the texts that are broken or larger than `MAX_UNPACKED`).
    A transparent colour is scaled as Pillow scales the samples.

    Raises DamagedError, and whatever Pillow raises.
    """
    file.seek(len(MAGIC))
    kept, info = [MAGIC], dict[str, Any](unread=[])
    key, useful = b"", _BEFORE_PIXELS
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            useful = _ANYWHERE
        used = kind in useful
        if not used and not _is_name(kind):
            raise DamagedError(f"broken PNG file (chunk {kind!r})")
        if not pixels and (not used or kind == b"IDAT" or length > _MAX_CHUNK):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data, check = file.read(length), file.read(4)
        if len(check) < 4:
            raise DamagedError("truncated PNG file")
        if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(check, "big"):
            raise DamagedError(f"broken PNG file (bad check sum of chunk {kind!r})")
        if not used:
            continue
        if kind in _PIXELS:
            kept += [head, data, check]
        if kind == b"IHDR" and length >= 13:
            info |= {"depth": data[8], "grey": data[9] in (0, 4)}
        elif kind == b"tRNS":
            key = data
        elif kind in _COLOURS:
            info |= _colour(kind, data)
        elif kind == b"eXIf":
            info["exif"] = b"Exif\0\0" + data
        elif kind in _TEXTS:
            _add_text(kind, data, info)
    else:
        if pixels:
            raise DamagedError("truncated PNG file")
    kept.append(struct.pack(">I", 0) + (b"IEND\xae\x42\x60\x82" if pixels else b"IDAT"))
    image = Image.open(io.BytesIO(b"".join(kept)), formats=["PNG"])
    image.info.update(info)
    if "transparency" in image.info and image.mode != "P":
        image.info["transparency"] = _transparent(key, info["depth"], info["grey"])
    return image


def samples(image: Image.Image) -> Iterator[np.ndarray]:
    """All bits of an image of 16 bits per sample that `open_png` gave and that is not loaded: bands of rows, from the
    top, as uint16 [rows, width, channels]."""
    data = image.fp.getvalue()  # type: ignore[attr-defined]
    if image.mode == "RGBA" and image.info["grey"]:  # grey and alpha: their four bytes, read as four channels
        planes = [_load(data, "RGBA")]
    elif image.mode in ("RGB", "RGBA"):  # Pillow keeps one byte of each sample: it reads all first bytes, then all last
        planes = [_load(data, f"{image.mode};16B"), _load(data, f"{image.mode};16L")]
    else:
        planes = [image]
    for top in range(0, image.height, _BAND):
        rows = (0, top, image.width, min(top + _BAND, image.height))
        bands = [np.asarray(plane.crop(rows)).astype(np.uint16) for plane in planes]
        if len(bands) == 2:
            yield bands[0] << 8 | bands[1]
        elif bands[0].ndim == 3:
            yield bands[0][..., 0::2] << 8 | bands[0][..., 1::2]
        else:
            yield bands[0][..., None]


def _load(data: bytes, rawmode: str) -> Image.Image:
    image: Any = Image.open(io.BytesIO(data), formats=["PNG"])
    image.tile = [image.tile[0]._replace(args=rawmode)]
    image.load()
    return image


def _colour(kind: bytes, data: bytes) -> dict[str, Any]:
    if kind == b"iCCP":
        packed = data.partition(b"\0")[2]
        return {"icc_profile": _unpack(packed[1:]) or b""}
    if kind == b"gAMA" and len(data) >= 4:
        return {"gamma": int.from_bytes(data[:4], "big") / 100_000}
    if kind == b"cHRM" and len(data) >= 32:
        return {"chromaticity": tuple(value / 100_000 for value in struct.unpack(">8I", data[:32]))}
    if kind == b"sRGB":
        return {"srgb": data[:1]}
    return {"cicp": tuple(data[:4])} if kind == b"cICP" else {}


def _add_text(kind: bytes, data: bytes, info: dict[str, Any]) -> None:
    keyword, _, text = data.partition(b"\0")
    name = _KEPT_TEXTS.get(keyword)
    if name is None or (name == "exif" and kind != b"tEXt"):
        return
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    unpacked = _unpack(text) if packed else text
    if unpacked is None or len(unpacked) > MAX_UNPACKED:
        info["unread"].append(keyword.decode())
    else:
        info[name] = unpacked if name == "exif" else unpacked.decode("latin-1")


def _unpack(data: bytes) -> bytes | None:
    """None where it has more than `MAX_UNPACKED` bytes or is broken."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, MAX_UNPACKED)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail else unpacked


def _transparent(key: bytes, depth: int, grey: bool) -> int | tuple[int, ...]:
    """The transparent colour as Pillow's samples have it: of 1, 2 and 4 bits they are scaled to 8. Bits of the key
    above the depth do not count (PNG, 11.3.1.1)."""
    most = 2**depth - 1
    scale = 255 // most if depth < 8 else 1
    values = [(value & most) * scale for value in struct.unpack(f">{1 if grey else 3}H", key[: 2 if grey else 6])]
    return values[0] if grey else tuple(values)
