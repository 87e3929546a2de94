"""The colours of an image file → sRGB.

The rendering intent is relative colorimetric without black point compensation, as in libvips. Where a file describes
its colours in several ways, the order of the PNG specification (third edition, 4.3) decides: cICP, the ICC profile,
sRGB, gAMA with cHRM. A description that cannot be used is ignored, as browsers do: the pixels stay as they are.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

Space = Literal["RGB", "GRAY", "CMYK"]

_SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green, blue
_PRIMARIES = {  # of cICP (ITU-T H.273, table 2)
    1: _SRGB,
    9: (0.3127, 0.329, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI-P3
    12: (0.3127, 0.329, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
_BT709 = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_CURVES: dict[int, tuple[float, ...]] = {  # of cICP (H.273, table 3); parameters of ICC's curves, those of HDR lack
    1: _BT709,
    4: (2.2,),
    5: (2.8,),
    6: _BT709,
    8: (1.0,),
    13: (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),  # sRGB
    14: _BT709,
    15: _BT709,
}
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_DEVICES = ("mntr", "scnr", "prtr", "spac")  # ICC's classes of profiles that describe pixels
_NO_OPTIMIZATION = 0x0100  # of LittleCMS, whose optimized transform of a linear grey is off by 10 of 255
_CLOSE = 2  # of 255: a profile that changes no colour by more is sRGB
_LARGE = 2**16  # bytes of a profile


class Conversion:
    """Pixels in the colours of one profile → sRGB. Raises what Pillow raises where the profile has no such use."""

    def __init__(self, profile: Any, space: Space) -> None:
        from PIL import ImageCms

        self._space = space
        self._mode = "L" if space == "GRAY" else space
        flags = ImageCms.Flags(_NO_OPTIMIZATION) if space == "GRAY" else ImageCms.Flags.NONE
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.ImageCmsTransform(profile, srgb, self._mode, "RGB", intent, flags=flags)
        self._transform = transform.transform
        ramp = np.arange(256, dtype=np.uint8)
        if space == "GRAY":
            self._curves = np.asarray(self._apply(Image.fromarray(ramp[None])))[0].T  # [3, 256]
            off = np.abs(self._curves.astype(int) - ramp)
        elif space == "RGB":
            grid = np.stack(np.meshgrid(*[ramp[::15]] * 3), -1).reshape(-1, 3)
            probe = np.concatenate([grid, np.stack([ramp] * 3, -1)])[None]
            off = np.abs(np.asarray(self._apply(Image.fromarray(probe))).astype(int) - probe)
        self.identity = space != "CMYK" and int(off.max()) <= _CLOSE
        """Whether the colours are those of sRGB already."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB of an image of 8 bits per sample; alpha is dropped."""
        image = image if image.mode == self._mode else image.convert(self._mode)
        if self._space != "GRAY":
            return self._apply(image)
        return Image.merge("RGB", [image.point(curve.tolist()) for curve in self._curves])

    def deep(self, samples: np.ndarray) -> np.ndarray:
        """float32 [rows, width, 3] in 0…255 of uint16 [rows, width, 1 or 3], interpolated between the colours of 8
        bits: dark linear colours of 16 bits need the precision."""
        if self._space == "GRAY":
            levels = np.arange(256) * 257
            return np.stack([np.interp(samples[..., 0], levels, curve) for curve in self._curves], -1)
        cell = np.minimum(samples // 257, 254).astype(np.uint8)
        part = samples / np.float32(257) - cell
        corner = np.asarray(self._apply(Image.fromarray(cell))).astype(np.float32)
        colours = corner.copy()
        for channel in range(3):
            step = cell.copy()
            step[..., channel] += 1
            difference = np.asarray(self._apply(Image.fromarray(step))) - corner
            colours += part[..., channel, None] * difference
        return colours.clip(0, 255)

    def _apply(self, image: Image.Image) -> Image.Image:
        converted = Image.new("RGB", image.size)
        self._transform.apply(image.getim(), converted.getim())
        return converted


def conversion(image: Image.Image) -> tuple[Conversion | None, str]:
    """What the colours of an opened image need: None if they are used as they are.

    Beside it why the file's description of its colours is not used; "" if it is, or if there is none.
    """
    space: Space = "CMYK" if image.mode == "CMYK" else "RGB"
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I") or image.info.get("grey"):
        space = "GRAY"
    unused = ""
    if cicp := image.info.get("cicp"):
        found, unused = _of_code_points(cicp, space)
        if not unused:
            return found, ""
    profile = _embedded(image)
    if profile is not None:
        return (_build_large if len(profile) > _LARGE else _build_small)(profile, space)
    if "srgb" in image.info:
        return None, ""
    if "gamma" in image.info:
        return _of_gamma(image.info["gamma"], image.info.get("chromaticity"), space)
    return None, unused


def _embedded(image: Image.Image) -> bytes | None:
    """The ICC profile; b"" if it is there and cannot be read."""
    if image.format not in ("JPEG", "MPO"):
        return image.info.get("icc_profile")
    segments: list[tuple[str, bytes]] = image.applist  # type: ignore[attr-defined]
    parts = sorted(data[12:] for name, data in segments if name == "APP2" and data.startswith(b"ICC_PROFILE\0"))
    if not parts:
        return None
    complete = len(parts[0]) > 1 and parts[0][1] == len(parts)
    return b"".join(part[2:] for part in parts) if complete else b""


def _build(data: bytes, space: Space) -> tuple[Conversion | None, str]:
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        held, device = profile.profile.xcolor_space.strip(), profile.profile.device_class
    except Exception:  # LittleCMS knows many ways in which a profile can be broken
        return None, "colour profile not readable"
    if device not in _DEVICES:
        return None, f"colour profile not used: it has class {device!r}, expected one of {', '.join(_DEVICES)}"
    try:
        if held == space:
            found = Conversion(profile, space)
            return None if found.identity else found, ""
        if (held, space) == ("RGB", "GRAY") and Conversion(profile, "RGB").identity:
            return None, ""  # as many programs write that make pictures grey
    except Exception:
        return None, "colour profile not usable: it has no conversion to sRGB"
    return None, f"colour profile not used: it is of {held}, the pixels are {space}"


_build_small = lru_cache(64)(_build)
_build_large = lru_cache(4)(_build)


def _of_code_points(cicp: tuple[int, ...], space: Space) -> tuple[Conversion | None, str]:
    primaries, transfer, matrix, full_range = cicp if len(cicp) == 4 else (0, 0, 0, 0)
    if primaries not in _PRIMARIES or transfer not in _CURVES or matrix != 0 or full_range != 1:
        return None, f"colours not used: code points {list(cicp)} (cICP) are not supported"
    return _build_small(_profile(_PRIMARIES[primaries], _CURVES[transfer], space), space)


def _of_gamma(gamma: float, chromaticity: tuple[float, ...] | None, space: Space) -> tuple[Conversion | None, str]:
    """A gamma within 5 % of 1/2.2 means sRGB's curve (as in libpng), unless the primaries are others."""
    usual = chromaticity is None or space == "GRAY" or np.allclose(chromaticity, _SRGB, rtol=0, atol=0.005)
    if usual and abs(gamma * 2.2 - 1) < 0.05:
        return None, ""
    try:
        if not 0.1 <= gamma <= 10:
            raise ValueError(f"gamma {gamma}")
        profile = _profile(_SRGB if usual or chromaticity is None else chromaticity, (1 / gamma,), space)
    except (ZeroDivisionError, struct.error, np.linalg.LinAlgError, ValueError):
        return None, f"colours not used: gamma {gamma:g} and chromaticities {chromaticity} are no colours"
    return _build_small(profile, space)


def _profile(primaries: tuple[float, ...], curve: tuple[float, ...], space: Space) -> bytes:
    """A minimal ICC profile (version 4.3): a curve, and for RGB the matrix of these primaries."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)

    kind = {1: 0, 5: 3}[len(curve)]
    curve_tag = b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + b"".join(_fixed(value) for value in curve)
    tags = [(b"wtpt", xyz(_D50))]
    if space == "GRAY":
        tags.append((b"kTRC", curve_tag))
    else:
        white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(*[iter(primaries)] * 2, strict=True))
        matrix = np.stack(colours, 1)
        matrix = matrix * np.linalg.solve(matrix, white)
        to_d50 = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD
        for letter, column in zip("rgb", (to_d50 @ matrix).T, strict=True):
            tags += [(f"{letter}XYZ".encode(), xyz(column)), (f"{letter}TRC".encode(), curve_tag)]
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x04300000, b"mntr", space.ljust(4).encode(), b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp" + bytes(28) + b"".join(_fixed(value) for value in _D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
