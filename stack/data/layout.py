"""Where the tensors of a pre-encoded sample stand inside its safetensors member."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

from stack.data.safety import DecodeError

HEAD_BYTES = 4096
"""A first read of this many holds most headers whole."""
_MAX_HEADER = 2**20  # the format allows 100 MB, a sample of 999 captions needs less than one
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
_NUM_SIDES = {"latent_mean": 3, "latent_logvar": 3, "t5": 2, "t5_scale": 1, "clip_l": 2, "clip_g": 2, "pooled": 1}


class Slot(NamedTuple):
    dtype: str
    """F32, BF16 or F8_E4M3."""
    shape: tuple[int, ...]
    start: int
    """Of the first byte, from the member's own start."""
    stop: int


class Layout(NamedTuple):
    slots: dict[str, Slot]
    size: int
    """Bytes of the whole member."""

    @property
    def latent(self) -> tuple[int, int]:
        """(width, height) of the latent."""
        _, height, width = self.slots["latent_mean"].shape
        return width, height

    @property
    def caption_lengths(self) -> list[int]:
        """Tokens of each caption: of its longest encoder; −1 for one that the sample lacks."""
        found: dict[int, int] = {}
        for name, slot in self.slots.items():
            encoder, _, number = name.partition(".")
            caption = int(number or 0)
            if len(slot.shape) == 2:
                found[caption] = max(found.get(caption, 0), slot.shape[0])
            elif encoder == "pooled":
                found.setdefault(caption, 0)
        return [found.get(caption, -1) for caption in range(max(found, default=-1) + 1)]


def header_bytes(head: bytes | memoryview) -> int:
    """Bytes of the whole header, told by a member's first 8; at most those of the largest that is read."""
    return 8 + min(int.from_bytes(head[:8], "little"), _MAX_HEADER)


def parse(header: bytes) -> Layout:
    """The layout told by a whole header: 8 bytes of length N, then N bytes of JSON.

    Raises DecodeError unless it is that of a pre-encoded sample: known names and dtypes, tensors that fill the member
    without overlap or gap, a latent of equal mean and logvar [C, h, w], a pooled vector.
    """
    if len(header) < 8 or int.from_bytes(header[:8], "little") != len(header) - 8:
        raise DecodeError(f"safetensors not readable: header of {int.from_bytes(header[:8], 'little'):,} bytes")
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        slots = {
            str(name): Slot(
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                *(len(header) + int(at) for at in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except Exception as error:  # hostile JSON fails in many ways
        raise DecodeError(f"safetensors not readable: {' '.join(str(error).split()) or type(error).__name__}") from None
    at = len(header)
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        base, dot, number = name.partition(".")
        numbered = bool(re.fullmatch(r"[1-9]\d{0,2}", number)) and not base.startswith("latent_")
        if base not in _NUM_SIDES or (dot and not numbered):
            raise DecodeError(f"safetensors not readable: tensor {name[:80]!r}")
        sides = len(slot.shape) == _NUM_SIDES[base] and all(0 <= side < 2**31 for side in slot.shape)
        if slot.dtype not in _ITEM_BYTES or not sides:
            raise DecodeError(f"safetensors not readable: {name} is {slot.dtype[:80]} {list(slot.shape)[:8]}")
        if slot.start != at or slot.stop - slot.start != math.prod(slot.shape) * _ITEM_BYTES[slot.dtype]:
            raise DecodeError(f"safetensors not readable: {name} has bytes {slot.start} to {slot.stop}")
        at = slot.stop
    latents = [slots[name].shape if name in slots else () for name in ("latent_mean", "latent_logvar")]
    if len(latents[0]) != 3 or latents[0] != latents[1] or len(slots.get("pooled", ("", ()))[1]) != 1:
        raise DecodeError(f"safetensors not readable: no pre-encoded sample, latent_mean has shape {list(latents[0])}")
    for name, slot in slots.items():
        base, dot, number = name.partition(".")
        twin = slots.get({"t5_scale": "t5", "clip_g": "clip_l"}.get(base, base) + dot + number, slot)
        if twin.shape[0] != slot.shape[0]:
            raise DecodeError(f"safetensors not readable: {name} has {slot.shape[0]} tokens, not {twin.shape[0]}")
    return Layout(slots, at)
