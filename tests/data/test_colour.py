"""Every file's colours as sRGB on white: against LittleCMS, and against the equations where there are any."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from stack.data.images import decode_image, unused_metadata

# ---- minimal ICC profiles (version 2)

SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
_D50 = np.array([0.9642, 1.0, 0.8249])


def rgb_profile(primaries: Any = ADOBE, gamma: float = 2.2, white: Any = (0.3127, 0.3290)) -> bytes:
    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1.0, (1 - x - y) / y])

    matrix = np.stack([xyz(*primary) for primary in primaries], 1)
    matrix = matrix * np.linalg.solve(matrix, xyz(*white))
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    matrix = np.linalg.inv(bradford) @ np.diag((bradford @ _D50) / (bradford @ xyz(*white))) @ bradford @ matrix
    tags = [(f"{name}XYZ".encode(), _xyz(column)) for name, column in zip("rgb", matrix.T, strict=True)]
    return _profile(b"RGB ", b"mntr", b"XYZ ", [*tags, *((f"{name}TRC".encode(), _curve(gamma)) for name in "rgb")])


def grey_profile(gamma: float = 1.0) -> bytes:
    return _profile(b"GRAY", b"mntr", b"XYZ ", [(b"kTRC", _curve(gamma))])


def cmyk_profile(device: bytes = b"prtr") -> bytes:
    """Inks as ideal filters over a paper whose darkest black has L* = 10, as a table of 3⁴ Lab colours."""
    colours = []
    for c, m, y, k in product((0, 0.5, 1), repeat=4):
        light = 10 + 90 * (1 - k) * (1 - 0.3 * c) * (1 - 0.35 * m) * (1 - 0.05 * y)
        a, b = (1 - k) * (-40 * c + 75 * m - 5 * y), (1 - k) * (-45 * c - 5 * m + 85 * y)
        colours += [round(light * 2.55), round(a + 128), round(b + 128)]
    identity = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0" + bytes([4, 3, 3, 0]) + b"".join(struct.pack(">i", v) for v in (65536, 0, 0, 0) * 2 + (65536,))
    )
    lut += identity * 4 + bytes(colours) + identity * 3
    return _profile(b"CMYK", device, b"Lab ", [(b"A2B0", lut), (b"A2B1", lut)])


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, device: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = [(b"desc", description), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", _xyz(_D50)), *tags]
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02100000, device, space, connection)
    head = head.ljust(36, b"\0") + b"acsp" + bytes(28) + b"".join(map(_fixed, _D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# ---- files

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 48, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (40, 48), np.uint8)
SRGB_CURVE = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
ADOBE_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
RGB_PROFILES = {
    "Adobe RGB": rgb_profile(),
    "Display P3": rgb_profile(DISPLAY_P3),
    "ProPhoto": rgb_profile(PROPHOTO, 1.8, (0.3457, 0.3585)),
    "linear": rgb_profile(SRGB, 1.0),
}
FORMS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 100, "subsampling": 0}}


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **{**FORMS[form], **options})
    return stream.getvalue()


def plain(data: bytes) -> Image.Image:
    """The image without colour conversion."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    converted = ImageCms.profileToProfile(image, source, srgb, renderingIntent=intent, outputMode="RGB")
    assert converted is not None
    return np.asarray(converted).astype(int)


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0…1 → 0…255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def seen(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data)).astype(int)


def off(image: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(image - truth).max())


def png(samples: np.ndarray, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these samples [rows, columns, channels]."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    height, width, _ = samples.shape
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    parts += [chunk(*one) for one in chunks]
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"name\0\0" + zlib.compress(profile)


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(values: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values))


# ---- profiles


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RGB_PROFILES)
def test_rgb_profiles_are_converted(name: str, form: str) -> None:
    profile = RGB_PROFILES[name]
    data = encoded(Image.fromarray(PIXELS), form, icc_profile=profile)
    assert off(seen(data), by_littlecms(plain(data).convert("RGB"), profile)) <= 1
    assert off(seen(data), np.asarray(plain(data).convert("RGB"))) > 40  # the profile does something
    assert unused_metadata(data) == []


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_grey_profiles_are_converted(gamma: float, form: str) -> None:
    data = encoded(Image.fromarray(PIXELS[..., 0]), form, icc_profile=grey_profile(gamma))
    linear = (np.asarray(plain(data)) / 255) ** (round(gamma * 256) / 256)
    assert off(seen(data), srgb(linear)[..., None]) <= 1


@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_a_ramp_of_linear_grey_is_exact_in_the_dark(gamma: float) -> None:
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    data = encoded(Image.fromarray(ramp), icc_profile=grey_profile(gamma))
    assert off(seen(data), srgb((ramp / 255) ** (round(gamma * 256) / 256))[..., None]) <= 1


def test_cmyk_is_converted_by_its_profile_and_stays_as_it_was_without() -> None:
    inks = RNG.integers(0, 256, (5, 6, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    profile = cmyk_profile()
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", icc_profile=profile)
    assert off(seen(data), by_littlecms(plain(data), profile)) <= 1
    assert off(seen(data), np.asarray(plain(data).convert("RGB"))) > 40
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG")
    assert np.array_equal(seen(data), np.asarray(plain(data).convert("RGB")))


def test_black_ink_stays_as_light_as_its_profile_has_it() -> None:
    """Relative colorimetric without black point compensation: L* = 10 is sRGB 27."""
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    data = encoded(image, "JPEG", icc_profile=cmyk_profile())
    assert off(seen(data), np.full((16, 16, 3), 27)) <= 3


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_is_kept_aside_and_composited_after_the_conversion(form: str) -> None:
    profile = RGB_PROFILES["Adobe RGB"]
    data = encoded(Image.fromarray(np.dstack([PIXELS, ALPHA])), form, icc_profile=profile)
    share = ALPHA[..., None] / 255
    assert off(seen(data), by_littlecms(Image.fromarray(PIXELS), profile) * share + 255 * (1 - share)) <= 1


def test_grey_with_alpha_and_palettes() -> None:
    grey = Image.fromarray(np.dstack([PIXELS[..., 0], ALPHA]), "LA")
    share, light = ALPHA[..., None] / 255, srgb(PIXELS[..., :1] / 255.0)
    data = encoded(grey, icc_profile=grey_profile())
    assert off(seen(data), light * share + 255 * (1 - share)) <= 1
    palette = Image.fromarray(PIXELS).quantize(32)
    profile = RGB_PROFILES["Display P3"]
    truth = by_littlecms(palette.convert("RGB"), profile)
    assert off(seen(encoded(palette, icc_profile=profile)), truth) <= 1
    keyed = seen(encoded(palette, icc_profile=profile, transparency=5))
    is_key = np.asarray(palette) == 5
    assert (keyed[is_key] == 255).all()
    assert off(keyed[~is_key], truth[~is_key]) <= 1


@pytest.mark.parametrize("form", FORMS)
def test_a_profile_of_srgb_leaves_the_pixels_alone(form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])):
        data = encoded(image, form, icc_profile=profile)
        assert np.array_equal(seen(data), np.asarray(plain(data).convert("RGB")))
        assert unused_metadata(data) == []


UNUSABLE = {
    "grey profile of RGB": ("RGB", "PNG", grey_profile(), "colour profile not used: it is of GRAY"),
    "grey profile of a WebP": ("RGB", "WEBP", grey_profile(), "colour profile not used: it is of GRAY"),
    "CMYK profile of RGB": ("RGB", "JPEG", cmyk_profile(), "colour profile not used: it is of CMYK"),
    "RGB profile of grey": ("L", "PNG", rgb_profile(), "colour profile not used: it is of RGB"),
    "RGB profile of CMYK": ("CMYK", "JPEG", rgb_profile(), "colour profile not used: it is of RGB"),
    "zeros": ("RGB", "PNG", bytes(5000), "colour profile not readable"),
    "a cut profile": ("RGB", "JPEG", rgb_profile()[:300], "colour profile not usable"),
    "a device link": ("CMYK", "JPEG", cmyk_profile(b"link"), "colour profile not used: it has class 'link'"),
    "17 MB": ("RGB", "PNG", bytes(17 * 2**20), "colour profile not readable"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_profile_that_cannot_be_used_leaves_the_pixels_alone_and_is_named(name: str) -> None:
    mode, form, profile, reason = UNUSABLE[name]
    data = encoded(Image.fromarray(PIXELS).convert(mode), form, icc_profile=profile)
    without = encoded(Image.fromarray(PIXELS).convert(mode), form)
    assert np.array_equal(seen(data), np.asarray(plain(without).convert("RGB")))
    (named,) = unused_metadata(data)
    assert named.startswith(reason)


def test_a_profile_in_many_segments_of_a_jpeg_in_any_order_and_behind_the_frame_header() -> None:
    profile = rgb_profile()
    large = struct.pack(">I", len(profile) + 150_000) + profile[4:] + RNG.bytes(150_000)
    data = encoded(Image.fromarray(PIXELS), "JPEG", icc_profile=large)
    truth = by_littlecms(plain(data).convert("RGB"), profile)
    assert data.count(b"ICC_PROFILE\0") == 3
    assert off(seen(data), truth) <= 1
    first = data.index(b"\xff\xe2")
    lengths, at = [], first
    while data[at : at + 2] == b"\xff\xe2":
        lengths.append(2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        at += lengths[-1]
    segments = [data[first + sum(lengths[:n]) : first + sum(lengths[: n + 1])] for n in range(3)]
    swapped = data[:first] + b"".join(segments[::-1]) + data[at:]
    assert off(seen(swapped), truth) <= 1
    scan = data.index(b"\xff\xda", at)
    assert off(seen(data[:first] + data[at:scan] + b"".join(segments) + data[scan:]), truth) <= 1
    lost = data[:first] + b"".join(segments[:2]) + data[at:]
    assert np.array_equal(seen(lost), np.asarray(plain(lost).convert("RGB")))
    assert unused_metadata(lost) == ["colour profile not readable"]


def test_a_large_profile_of_a_png_is_used() -> None:
    profile = rgb_profile()
    large = struct.pack(">I", len(profile) + 3_000_000) + profile[4:] + RNG.bytes(3_000_000)
    assert off(seen(png(PIXELS, 8, 2, iccp(large))), by_littlecms(Image.fromarray(PIXELS), profile)) <= 1


# ---- 16 bits, transparent colours


def test_dark_linear_colours_of_16_bits_keep_their_precision() -> None:
    samples = RNG.integers(0, 65536, (70, 33, 4))
    samples[:20, :, :3] //= 200
    linear, share = samples[..., :3] / 65535, samples[..., 3:] / 65535
    colours, grey = iccp(RGB_PROFILES["linear"]), iccp(grey_profile())
    light = srgb(linear)
    assert off(seen(png(samples[..., :3], 16, 2, colours)), light) <= 1.5
    assert off(seen(png(samples, 16, 6, colours)), light * share + 255 * (1 - share)) <= 1.5
    assert off(seen(png(samples[..., :1], 16, 0, grey)), light[..., :1]) <= 1.5
    mixed = light[..., :1] * share + 255 * (1 - share)
    assert off(seen(png(samples[..., [0, 3]], 16, 4, grey)), mixed) <= 1.5


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("with_profile", [False, True])
def test_a_transparent_grey_of_any_depth_is_white(depth: int, with_profile: bool) -> None:
    most = 2**depth - 1
    samples = RNG.integers(0, most + 1, (9, 13, 1))
    light = samples * 255 / most
    chunks = [iccp(grey_profile())] if with_profile else []
    truth = srgb(light / 255) if with_profile else light
    for key in {0, 1, most, int(samples[4, 5, 0])}:
        image = seen(png(samples, depth, 0, *chunks, (b"tRNS", struct.pack(">H", key))))
        assert off(image, np.where(samples == key, 255, truth)) <= 1


def test_transparent_colours_are_compared_at_full_depth() -> None:
    near = np.array([[[1000, 2000, 3000], [1000, 2000, 3001], [1001, 2000, 3000]]])
    image = seen(png(near, 16, 2, (b"tRNS", struct.pack(">3H", 1000, 2000, 3000))))
    assert image.tolist() == [[[255] * 3, [3, 7, 11], [3, 7, 11]]]
    grey = near[..., 2:]
    assert seen(png(grey, 16, 0, (b"tRNS", struct.pack(">H", 3000))))[0, :, 0].tolist() == [255, 12, 255]
    eight = np.array([[[10, 20, 30], [10, 20, 31]]])
    key = struct.pack(">3H", 10 + 256, 20, 30)  # bits above the depth do not count
    assert seen(png(eight, 8, 2, (b"tRNS", key))).tolist() == [[[255] * 3, [10, 20, 31]]]


# ---- PNG's own descriptions


@pytest.mark.parametrize(
    "chunks",
    [
        [gama(0.45455)],
        [gama(0.45455), chrm(SRGB_CURVE)],
        [chrm(ADOBE_CHROMATICITY)],
        [(b"sRGB", b"\0"), gama(1.0)],
        [(b"cICP", bytes([1, 13, 0, 1])), iccp(RGB_PROFILES["Adobe RGB"])],
    ],
)
def test_chunks_that_mean_srgb_leave_the_pixels_alone(chunks: list[tuple[bytes, bytes]]) -> None:
    data = png(PIXELS, 8, 2, *chunks)
    assert np.array_equal(seen(data), PIXELS)
    assert unused_metadata(data) == []


def test_gamma_chromaticities_and_code_points_are_converted() -> None:
    image, grey = Image.fromarray(PIXELS), PIXELS[..., :1]
    assert off(seen(png(PIXELS, 8, 2, gama(1.0))), srgb(PIXELS / 255.0)) <= 1
    assert off(seen(png(grey, 8, 0, gama(1.0))), srgb(grey / 255.0)) <= 1
    adobe = by_littlecms(image, RGB_PROFILES["Adobe RGB"])
    assert off(seen(png(PIXELS, 8, 2, gama(256 / 563), chrm(ADOBE_CHROMATICITY))), adobe) <= 2
    display = by_littlecms(image, RGB_PROFILES["Display P3"])
    assert off(seen(png(PIXELS, 8, 2, (b"cICP", bytes([12, 4, 0, 1])))), display) <= 1
    assert off(seen(png(PIXELS, 8, 2, (b"cICP", bytes([1, 8, 0, 1])))), srgb(PIXELS / 255.0)) <= 1
    hdr = (b"cICP", bytes([9, 16, 0, 1]))  # the profile is for decoders without HDR
    assert off(seen(png(PIXELS, 8, 2, hdr, iccp(RGB_PROFILES["Adobe RGB"]))), adobe) <= 1


@pytest.mark.parametrize(
    "chunks",
    [
        [gama(0)],
        [gama(20_000)],
        [gama(0.45455), chrm((0,) * 8)],
        [(b"cICP", bytes([9, 16, 0, 1]))],
        [(b"cICP", b"\1")],
        [(b"iCCP", b"")],
        [(b"iCCP", b"name\0\0no zlib")],
    ],
)
def test_chunks_that_mean_nothing_leave_the_pixels_alone_and_are_named(chunks: list[tuple[bytes, bytes]]) -> None:
    data = png(PIXELS, 8, 2, *chunks)
    assert np.array_equal(seen(data), PIXELS)
    (named,) = unused_metadata(data)
    assert named.startswith("colour")


# ---- everywhere


def test_all_that_reads_images_sees_the_converted_colours(tmp_path, pack) -> None:
    """Training of models of pixels, the references of evaluations, and lint."""
    from stack.data.images import to_pixels
    from stack.data.lint import lint
    from stack.evaluate.metrics import images_in

    profile = RGB_PROFILES["Adobe RGB"]
    good = encoded(Image.new("RGB", (32, 32), (200, 40, 60)), icc_profile=profile)
    wrong = encoded(Image.new("L", (32, 32), 200), icc_profile=profile)
    red = by_littlecms(plain(good), profile)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(good)
    assert off(next(images_in(tmp_path / "images")).astype(int), red) <= 1
    assert off((to_pixels(good, (32, 32), 3).permute(1, 2, 0).numpy() + 1) * 127.5, red) <= 1.1
    members = [("a.png", good), ("a.txt", b"red"), ("b.png", wrong), ("b.txt", b"grey")]
    problems = list(lint(pack(tmp_path / "shards" / "x.tar", members).parent))
    assert [(problem.key, problem.reason) for problem in problems] == [
        ("b", "colour profile not used: it is of RGB, the pixels are GRAY")
    ]
