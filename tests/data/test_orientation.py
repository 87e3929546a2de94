"""Every orientation in every carrier of every format: size and pixels are those of Pillow's ImageOps.exif_transpose."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from stack.data.images import decode_image, image_size, unused_metadata
from stack.data.index import build_index

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
XMP = b"XML:com.adobe.xmp"


def tiff(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0" + bytes([orientation, 0, 0, 0, 0, 0, 0])


def attribute(orientation: int) -> bytes:
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def element(orientation: int) -> bytes:
    return b"<x:xmpmeta><tiff:Orientation>%d</tiff:Orientation></x:xmpmeta>" % orientation


def raw(orientation: int) -> bytes:
    """As ImageMagick 6 keeps a profile in a PNG."""
    data = b"Exif\0\0" + tiff(orientation)
    digits = data.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    return b"\nexif\n%8d\n" % len(data) + "\n".join(lines).encode() + b"\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text(keyword: bytes, data: bytes) -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + data)


def packed(keyword: bytes, data: bytes) -> bytes:
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(data))


def international(keyword: bytes, data: bytes, pack: bool = False) -> bytes:
    return chunk(
        b"iTXt",
        keyword + (b"\0\1\0" if pack else b"\0\0\0") + b"x-default\0\0" + (zlib.compress(data) if pack else data),
    )


def encoded(form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, form, **options)
    return stream.getvalue()


def png(extra: bytes, behind: bool) -> bytes:
    data = encoded("PNG")
    at = data.rindex(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    return data[:at] + extra + data[at:]


CHUNKS: dict[str, Callable[[int], bytes]] = {
    "eXIf": lambda n: chunk(b"eXIf", tiff(n)),
    "raw profile in tEXt": lambda n: text(b"Raw profile type exif", raw(n)),
    "raw profile in zTXt": lambda n: packed(b"Raw profile type exif", raw(n)),
    "raw profile in iTXt": lambda n: international(b"Raw profile type exif", raw(n), pack=True),
    "XMP in iTXt": lambda n: international(XMP, attribute(n)),
    "XMP in packed iTXt": lambda n: international(XMP, element(n), pack=True),
    "XMP in zTXt": lambda n: packed(XMP, attribute(n)),
    "XMP in tEXt": lambda n: text(XMP, element(n)),
    "EXIF wins over XMP": lambda n: international(XMP, attribute(9 - n)) + chunk(b"eXIf", tiff(n)),
    "the last EXIF wins": lambda n: chunk(b"eXIf", tiff(9 - n)) + chunk(b"eXIf", tiff(n)),
    "EXIF wins over a raw profile": lambda n: chunk(b"eXIf", tiff(n)) + text(b"Raw profile type exif", raw(9 - n)),
    "XMP beside EXIF without orientation": lambda n: (
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0") + text(XMP, element(n))
    ),
}
FILES: dict[str, Callable[[int], bytes]] = {
    **{f"PNG: {name}, before": lambda n, make=make: png(make(n), behind=False) for name, make in CHUNKS.items()},
    **{f"PNG: {name}, behind": lambda n, make=make: png(make(n), behind=True) for name, make in CHUNKS.items()},
    "JPEG: EXIF": lambda n: encoded("JPEG", exif=b"Exif\0\0" + tiff(n)),
    "JPEG: XMP": lambda n: encoded("JPEG", xmp=attribute(n)),
    "JPEG: XMP as an element": lambda n: encoded("JPEG", xmp=element(n)),
    "JPEG: EXIF wins over XMP": lambda n: encoded("JPEG", exif=b"Exif\0\0" + tiff(n), xmp=attribute(9 - n)),
    "WebP: EXIF": lambda n: encoded("WEBP", exif=b"Exif\0\0" + tiff(n), lossless=True),
    "WebP: EXIF without a prefix": lambda n: encoded("WEBP", exif=tiff(n), lossless=True),
    "WebP: XMP": lambda n: encoded("WEBP", xmp=attribute(n), lossless=True),
    "WebP: XMP as an element": lambda n: encoded("WEBP", xmp=element(n), lossless=True),
}  # fmt: skip


def test_images_are_turned_as_pillow_turns_them_and_the_index_has_their_sizes(tmp_path, pack) -> None:
    files, members = {}, []
    for number, (name, make) in enumerate(FILES.items()):
        for orientation in range(1, 9):
            data = make(orientation)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            assert upright is not None
            assert upright.size == ((7, 9) if orientation > 4 else (9, 7)), name  # the carrier is one that Pillow reads
            assert decode_image(data).tobytes() == upright.convert("RGB").tobytes(), (name, orientation)
            assert image_size(data) == image_size(io.BytesIO(data)) == upright.size, (name, orientation)
            assert unused_metadata(data) == []
            key = f"{number:02}-{orientation}"
            files[key] = upright.size
            members += [(f"{key}.{name.partition(':')[0].lower()}", data), (f"{key}.txt", b"a picture")]
    index = build_index(pack(tmp_path / "x.tar", members))
    assert {key: (w, h) for key, w, h in zip(index.keys, index.width, index.height, strict=True)} == files


@pytest.mark.parametrize("orientation", [0, 9])
def test_orientations_that_do_not_exist_turn_nothing(orientation: int) -> None:
    for kind in ("eXIf", "XMP in iTXt"):
        data = png(CHUNKS[kind](orientation), behind=True)
        assert (image_size(data), decode_image(data).tobytes()) == ((9, 7), PIXELS.tobytes())


def test_an_orientation_that_pillow_does_not_apply_is_named() -> None:
    """ImageMagick's oldest name of EXIF in a PNG."""
    data = png(packed(b"Raw profile type APP1", raw(6)), behind=True)
    assert decode_image(data).tobytes() == PIXELS.tobytes()
    assert unused_metadata(data) == ["orientation 6 not used: it is in a raw profile of type APP1"]
    agreeing = png(packed(b"Raw profile type APP1", raw(6)) + chunk(b"eXIf", tiff(6)), behind=True)
    assert (decode_image(agreeing).size, unused_metadata(agreeing)) == ((7, 9), [])


@pytest.mark.parametrize("size", [3_000_000, 40_000_000])
@pytest.mark.parametrize("keyword", [b"parameters", XMP])
@pytest.mark.parametrize("make", [packed, international], ids=["zTXt", "iTXt"])
def test_large_texts_cost_neither_the_image_nor_its_orientation(size: int, keyword: bytes, make: Callable) -> None:
    options = {} if make is packed else {"pack": True}
    data = png(make(keyword, bytes(size), **options) + chunk(b"eXIf", tiff(6)), behind=False)
    assert image_size(data) == decode_image(data).size == (7, 9)
    unread = [f"{XMP.decode()} not used: not readable, or more than 16,777,216 bytes"]
    assert unused_metadata(data) == (unread if keyword == XMP and size > 2**24 else [])


def test_texts_cannot_pass_for_what_pillow_knows_of_the_pixels() -> None:
    for keyword in (b"transparency", b"icc_profile", b"gamma", b"interlace", b"exif"):
        data = png(text(keyword, b"1"), behind=False)
        assert decode_image(data).tobytes() == PIXELS.tobytes()


def test_a_png_of_many_small_pixel_chunks_is_measured_without_reading_them(tmp_path, pack) -> None:
    """As libpng writes them: 8 kB each, and the orientation behind."""
    pixels = np.random.default_rng(0).integers(0, 256, (2600, 2600, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    data = stream.getvalue()
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels), 0)
    assert len(body) > 2**24  # more than is read of an image beside its pixels
    small = b"".join(chunk(b"IDAT", body[start : start + 8192]) for start in range(0, len(body), 8192))
    data = data[: data.index(b"IDAT") - 4] + small + chunk(b"eXIf", tiff(6)) + chunk(b"IEND", b"")
    index = build_index(pack(tmp_path / "x.tar", [("a.png", data), ("a.txt", b"noise")]))
    assert (index.rejected, index.width.tolist(), index.height.tolist()) == ([], [2600], [2600])
    assert np.array_equal(np.asarray(decode_image(data)), np.rot90(pixels, -1))
