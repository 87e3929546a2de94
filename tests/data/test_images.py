from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stack.data.buckets import fit
from stack.data.images import DecodeError, decode_image, image_size, to_bucket
from stack.data.index import build_index
from stack.data.shards import ShardReader
from stack.data.sources import find_shards

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def _encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def test_rgba_shows_the_background_where_it_is_transparent() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (200, 100, 0, 51)  # a fifth
    data = _encode(Image.fromarray(pixels))
    white, green = (np.asarray(decode_image(data, background)) for background in [(255, 255, 255), (0, 250, 0)])
    assert white.tolist() == [[[200, 100, 0], [244, 224, 204]], [[255] * 3] * 2]
    assert green.tolist() == [[[200, 100, 0], [40, 220, 0]], [[0, 250, 0]] * 2]


@pytest.mark.parametrize("progressive", [False, True])
def test_what_stands_behind_a_jpegs_end_is_none_of_its_scans(progressive: bool) -> None:
    """A telephone's motion photo: a JPEG, whose EXIF has a whole thumbnail, and a video behind it."""
    image = Image.fromarray(_noise(64, 48))
    exif = b"Exif\0\0" + _encode(Image.new("RGB", (8, 8)), "JPEG")
    data = _encode(image, "JPEG", progressive=progressive, exif=exif, restart_marker_blocks=2)
    moving = data + 500 * b"ftypmp42\0\xff\xda"
    assert np.array_equal(np.asarray(decode_image(moving)), np.asarray(decode_image(data)))


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 0, 0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    data = _encode(image, transparency=transparency)
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((1, 0)) == (0, 0, 0)  # the trap
    assert np.asarray(decode_image(data)).tolist() == [[[200, 100, 0], [255, 255, 255]]]


def test_grey_with_alpha_and_colour_key() -> None:
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert np.asarray(decode_image(_encode(grey))).tolist() == [[[10] * 3, [255] * 3]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert np.asarray(decode_image(_encode(keyed, transparency=(4, 5, 6)))).tolist() == [[[1, 2, 3], [255] * 3]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(decode_image(_encode(grey)))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(decode_image(_encode(image, "JPEG", quality=95)))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes_equal_plain_conversion(mode: str) -> None:
    image = Image.fromarray(_noise(9, 7)).convert(mode)
    assert decode_image(_encode(image)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_exif_orientation(orientation: int, form: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(Image.fromarray(_noise(9, 7)), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    assert decode_image(data).tobytes() == upright.convert("RGB").tobytes()
    assert image_size(data) == upright.size == ((7, 9) if orientation >= 5 else (9, 7))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    data = _encode(Image.fromarray(_noise(16, 8)), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 20)
    assert decode_image(data).size == image_size(data) == (16, 8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_decode_errors(form: str) -> None:
    data = _encode(Image.fromarray(_noise(48, 48)), form)
    assert decode_image(data).size == (48, 48)
    for cut in range(0, len(data) - len(data) // 10, max(1, len(data) // 40)):
        with pytest.raises(DecodeError):
            decode_image(data[:cut])


def test_no_flipped_bit_of_a_png_passes() -> None:
    data = _encode(Image.fromarray(_noise(12, 12, 4)))
    truth = decode_image(data).tobytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        try:
            assert decode_image(bytes(flipped)).tobytes() == truth
        except DecodeError:
            continue


def test_flipped_headers_are_decode_errors() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = _encode(Image.fromarray(_noise(16, 16)), form)
        with pytest.raises(DecodeError):
            decode_image(bytes([data[0] ^ 0xFF]) + data[1:])


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (97, 331), (20, 10)])
@pytest.mark.parametrize("bucket", [(32, 32), (40, 24), (24, 40)])
def test_to_bucket_is_resize_then_crop(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    pixels = to_bucket(image, bucket)
    assert pixels.shape == (bucket[1], bucket[0], 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    resized, crop = fit(*size, bucket)
    expected = np.asarray(image.resize(resized, Image.Resampling.LANCZOS).crop(crop)).astype(int)
    assert np.abs(pixels - expected).max() <= 1


def test_to_bucket_of_its_own_size_changes_nothing() -> None:
    pixels = _noise(40, 24)
    assert np.array_equal(to_bucket(Image.fromarray(pixels), (40, 24)), pixels)


def test_to_bucket_of_a_thread_costs_no_memory() -> None:
    assert to_bucket(Image.new("RGB", (1, 1_000_000), (1, 2, 3)), (32, 32)).reshape(-1, 3).max(0).tolist() == [1, 2, 3]


@pytest.mark.skipif(not (DATA / "emoji").is_dir(), reason="shared data is not here")
@pytest.mark.parametrize(("name", "count"), [("emoji", 3786), ("photos", 384)])
def test_real_images_decode(name: str, count: int) -> None:
    indices = [build_index(path) for path in find_shards(DATA / name)]
    reader, decoded = ShardReader(indices), 0
    for shard, index in enumerate(indices):
        for row in range(len(index)):
            image = decode_image(reader.read(shard, row, index.image_extension(row)))
            assert (image.mode, image.size) == ("RGB", (index.width[row], index.height[row]))
            decoded += 1
            if name == "emoji" and row % 100 == 0:
                assert max(image.getextrema()[0]) == 255  # transparent ground is white, not black
    assert decoded == count
