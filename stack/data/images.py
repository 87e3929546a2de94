"""Bytes → RGB image → the pixels of a bucket."""

from __future__ import annotations

import re
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stack.data import colour, png
from stack.data.buckets import fit
from stack.data.safety import DecodeError, open_image

__all__ = ["DecodeError", "decode_image", "image_size", "to_bucket", "to_pixels", "unused_metadata"]

WHITE = (255, 255, 255)

_MAX_SCANS = 128  # of a progressive JPEG, each of which goes over all of the image; encoders write about ten
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # all markers that libjpeg takes, but those without a length
_EXIF_ORIENTATION = 0x0112
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # keys of `Image.info` that Pillow looks into
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {5, 6, 7, 8}


def image_size(data: bytes | IO[bytes]) -> tuple[int, int]:
    """(width, height) that `decode_image` gives; the pixels are skipped. Raises DecodeError."""
    image = open_image(data, pixels=False)
    width, height = image.size
    return (height, width) if _orientation(image) in _SWAPS_SIDES else (width, height)


def decode_image(data: bytes, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode the whole image to upright 8-bit sRGB; what is transparent shows `background`.

    Colours that the file describes otherwise (an ICC profile, or PNG's chunks) are converted (`stack.data.colour`).
    The orientation is that of Pillow's `ImageOps.exif_transpose`. A plain `convert("RGB")` drops alpha and uncovers
    whatever colour stands below it: black around most emoji, and jagged edges. Grey of 16 bits is scaled to 8, not
    clipped.

    Raises DecodeError if the header is refused (`safety.open_image`), or if the file is truncated or corrupt.
    """
    image = open_image(data)
    orientation = _orientation(image)
    if image.format in ("JPEG", "MPO") and _has_many_scans(data):
        raise DecodeError(f"image not decodable: more than {_MAX_SCANS} scans")
    try:
        image = _to_rgb(image, background)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise DecodeError(f"image not decodable: {' '.join(str(error).split()) or type(error).__name__}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def unused_metadata(data: bytes) -> list[str]:
    """What the file tells of its colours or orientation and `decode_image` does not follow. Raises DecodeError."""
    image = open_image(data, pixels=False)
    _, colours = colour.conversion(image)
    reasons = [colours] if colours else []
    reasons += [
        f"{name} not used: not readable, or more than {png.MAX_UNPACKED:,} bytes"
        for name in image.info.get("unread", ())
    ]
    if raw := image.info.get("Raw profile type APP1"):
        other = Image.Image()
        other.info["Raw profile type exif"] = raw
        if (orientation := _orientation(other)) in _UPRIGHT and orientation != _orientation(image):
            reasons.append(f"orientation {orientation} not used: it is in a raw profile of type APP1")
    return reasons


def to_bucket(image: Image.Image, bucket: tuple[int, int]) -> np.ndarray:
    """Cover-resize (Lanczos) and centre crop to `bucket` = (width, height): uint8 [height, width, 3]; of a grey image
    [height, width].

    Only the cropped part is resized, so an extreme aspect ratio costs no memory.
    """
    (resized_width, resized_height), (left, top, right, bottom) = fit(image.width, image.height, bucket)
    scale_x, scale_y = image.width / resized_width, image.height / resized_height
    box = (left * scale_x, top * scale_y, min(right * scale_x, image.width), min(bottom * scale_y, image.height))
    return np.array(image.resize(bucket, Image.Resampling.LANCZOS, box=box))


def to_pixels(data: bytes, bucket: tuple[int, int], channels: int) -> Tensor:
    """What a model of pixels sees of an image file: [channels, height, width] in −1…1, grey if there is one channel.

    Raises DecodeError.
    """
    image = decode_image(data)
    pixels = torch.from_numpy(to_bucket(image if channels == 3 else image.convert("L"), bucket))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 127.5 - 1


def _has_many_scans(data: bytes) -> bool:
    """Behind an image's end telephones append videos, which may hold any bytes; before it, EXIF a whole thumbnail."""
    if data.count(_SCAN) <= _MAX_SCANS:
        return False
    at, scans = 0, 0
    while scans <= _MAX_SCANS and (marker := _SEGMENT.search(data, at)) and marker[0] != _END:
        scans += marker[0] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans > _MAX_SCANS


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    conversion, _ = colour.conversion(image)
    sixteen_bits = image.info.get("depth") == 16
    if image.mode.startswith("I") or (sixteen_bits and (conversion or "transparency" in image.info)):
        bands = [_of_sixteen_bits(samples, image, conversion, background) for samples in png.samples(image)]
        return Image.fromarray(np.concatenate(bands))
    if not image.has_transparency_data:
        image.load()
        if conversion is not None:
            return conversion(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    layer = image.convert("RGBA")
    if conversion is not None:
        alpha = layer.getchannel("A")
        layer = conversion(layer)
        layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")


def _of_sixteen_bits(
    samples: np.ndarray, image: Image.Image, conversion: colour.Conversion | None, background: tuple[int, int, int]
) -> np.ndarray:
    """uint8 [rows, width, 3] of uint16 [rows, width, channels], which may end with alpha."""
    channels = 1 if image.info["grey"] else 3
    colours = samples[..., :channels]
    if conversion is not None:
        pixels = conversion.deep(colours)
    elif channels == 1:
        pixels = np.repeat((colours.astype(np.uint32) + 128) // 257, 3, -1)
    else:
        pixels = colours >> 8
    if samples.shape[-1] > channels:
        alpha = samples[..., channels:] / np.float32(65535)
        pixels = pixels * alpha + np.array(background) * (1 - alpha)
    elif "transparency" in image.info:
        transparent = (colours == np.array(image.info["transparency"])).all(-1, keepdims=True)
        pixels = np.where(transparent, np.array(background), pixels)
    return np.rint(pixels).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    if not any(name in image.info for name in _ORIENTED):
        return 1
    try:
        return Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)  # PngImageFile's own would decode the pixels first
    except Exception:  # a broken EXIF block says nothing against the pixels
        return 1
