"""Where the tensors of a pre-encoded sample stand inside its safetensors member.

Samples of one bucket and one caption length have the same header to the last byte, so a header is parsed once and then
looked up by its bytes.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import NamedTuple

from stack.data.safety import DecodeError

HEAD_BYTES = 4096
"""A first read of this many holds most headers whole."""
_MAX_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


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


def header_bytes(head: bytes) -> int:
    """Bytes of the whole header, told by a member's first 8."""
    return 8 + min(int.from_bytes(head[:8], "little"), _MAX_HEADER)


@lru_cache(maxsize=65536)
def parse(header: bytes) -> Layout:
    """The layout told by a whole header: 8 bytes of length N, then N bytes of JSON.

    Raises DecodeError unless it is that of a pre-encoded sample: allowed dtypes, tensors that fill the member without
    overlap or gap, a latent of equal mean and logvar [C, h, w], a pooled vector.
    """
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        slots = {
            str(name): Slot(
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                *(len(header) + int(at) for at in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except Exception as error:  # hostile JSON fails in many ways
        raise DecodeError(f"safetensors not readable: {' '.join(str(error).split()) or type(error).__name__}") from None
    at = len(header)
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        _, dot, number = name.partition(".")
        if dot and not (number.isdecimal() and len(number) < 4):
            raise DecodeError(f"safetensors not readable: tensor {name!r}")
        if slot.dtype not in _ITEM_BYTES or not all(0 <= side < 2**31 for side in slot.shape):
            raise DecodeError(f"safetensors not readable: {name} is {slot.dtype} {list(slot.shape)}")
        if slot.start != at or slot.stop - slot.start != math.prod(slot.shape) * _ITEM_BYTES[slot.dtype]:
            raise DecodeError(f"safetensors not readable: {name} has bytes {slot.start} to {slot.stop}")
        at = slot.stop
    latents = [slots[name].shape if name in slots else () for name in ("latent_mean", "latent_logvar")]
    if len(latents[0]) != 3 or latents[0] != latents[1] or len(slots.get("pooled", ("", ()))[1]) != 1:
        raise DecodeError(f"safetensors not readable: no pre-encoded sample, latent_mean has shape {list(latents[0])}")
    return Layout(slots, at)
