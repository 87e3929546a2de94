"""Pre-encoded samples from their shards into one batch: a read a sample, straight into the batch's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stack.data import layout
from stack.data.layout import Slot
from stack.data.safety import DecodeError
from stack.data.shards import ShardReader
from stack.text.conditioning import Pad, TextBatch

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_PADDED = ("t5", "t5_scale", "clip_l", "clip_g")  # their first side is the caption's length


class _Part(NamedTuple):
    name: str  # without the caption's number
    slot: Slot


def _find_parts(header: bytes, caption: int) -> tuple[int, tuple[_Part, ...]]:
    """Bytes of the whole member, and the tensors of one caption in the order they stand in. Raises DecodeError."""
    found = layout.parse(header)
    suffix = f".{caption}" if caption else ""
    listed = []
    for name, slot in found.slots.items():
        base, _, number = name.partition(".")
        if base.startswith("latent_") or int(number or 0) == caption:
            listed.append(_Part(base, slot))
    if f"pooled{suffix}" not in found.slots:
        raise DecodeError(f"no caption {caption}")
    return found.size, tuple(sorted(listed, key=lambda part: part.slot.start))


_known_parts = lru_cache(maxsize=65536)(_find_parts)


def read(reader: ShardReader, places: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """The tensors of some samples, each given as (shard, row, caption): [B, …] by name, padded with zeros.

    Beside those of `schema`, t5_length and clip_length: true tokens of each caption [B]. Memory is taken once, and each
    member read once into its rows of the batch. Raises UserError where a shard is not what was indexed,
    or samples don't go together.
    """
    parts: list[tuple[_Part, ...]] = []
    offsets: list[int] = []
    for shard, row, caption in places:
        index = reader.indices[shard]
        offset, length = index.span(row, "safetensors")
        head = os.pread(reader.handle(shard), layout.HEAD_BYTES, offset)
        stop = layout.header_bytes(head)
        header = head[:stop] if stop <= len(head) else os.pread(reader.handle(shard), stop, offset)
        try:
            small = len(header) <= layout.HEAD_BYTES
            size, found = (_known_parts if small else _find_parts)(header, caption)
        except DecodeError:
            raise reader.cut(shard) from None
        if size != length or (parts and not _alike(parts[0], found)):
            raise reader.cut(shard)
        parts.append(found)
        offsets.append(offset)

    tensors, rows = _allocate(parts)
    for at, ((shard, _, _), offset, found) in enumerate(zip(places, offsets, parts, strict=True)):
        _fill(reader, shard, offset, found, {name: row[at] for name, row in rows.items()})
    for name in ("t5", "clip_l", "clip_g"):
        if name in tensors:
            lengths = [part.slot.shape[0] for found in parts for part in found if part.name == name]
            tensors["t5_length" if name == "t5" else "clip_length"] = torch.tensor(lengths)
    return tensors


def _alike(one: tuple[_Part, ...], other: tuple[_Part, ...]) -> bool:
    """Whether two samples can stand in one batch: the same tensors, apart from the captions' lengths."""
    return len(one) == len(other) and all(
        a.name == b.name
        and a.slot.dtype == b.slot.dtype
        and a.slot.shape[a.name in _PADDED :] == b.slot.shape[b.name in _PADDED :]
        for a, b in zip(one, other, strict=True)
    )


def _allocate(parts: list[tuple[_Part, ...]]) -> tuple[dict[str, Tensor], dict[str, list[memoryview]]]:
    """Tensors for a batch [B, …], and each one's rows as bytes."""
    tensors, rows = {}, {}
    for column, (name, slot) in enumerate(parts[0]):
        shape = slot.shape
        if name in _PADDED:
            shape = max(found[column].slot.shape[0] for found in parts), *shape[1:]
        tensor = torch.empty((len(parts), *shape), dtype=_DTYPES[slot.dtype])
        tensors[name] = tensor
        view = memoryview(tensor.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
        step = len(view) // len(parts)
        rows[name] = [view[at * step : (at + 1) * step] for at in range(len(parts))]
    return tensors, rows


def _fill(reader: ShardReader, shard: int, offset: int, parts: tuple[_Part, ...], rows: dict[str, memoryview]) -> None:
    """Read one sample into its rows: tensors that stand behind one another by one call."""
    buffers: list[memoryview] = []
    start = stop = parts[0].slot.start
    for name, slot in parts:
        if slot.start != stop:
            _readv(reader, shard, offset + start, buffers)
            buffers, start = [], slot.start
        size = slot.stop - slot.start
        row = rows[name]
        buffers.append(row[:size])
        if len(row) > size:
            row[size:] = bytes(len(row) - size)
        stop = slot.stop
    _readv(reader, shard, offset + start, buffers)


def _readv(reader: ShardReader, shard: int, offset: int, buffers: list[memoryview]) -> None:
    if os.preadv(reader.handle(shard), buffers, offset) != sum(map(len, buffers)):
        raise reader.cut(shard)


def text_batch(tensors: dict[str, Tensor], pad: Pad) -> TextBatch:
    none = torch.zeros(len(tensors["pooled"]), dtype=torch.long)
    return TextBatch(
        t5_BLD=tensors.get("t5"),
        t5_scale_BL=tensors.get("t5_scale"),
        t5_length_B=tensors.get("t5_length", none),
        clip_l_BLD=tensors.get("clip_l"),
        clip_g_BLD=tensors.get("clip_g"),
        clip_length_B=tensors.get("clip_length", none),
        pooled_BD=tensors["pooled"],
        pad=pad,
    )
