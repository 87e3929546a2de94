"""Pre-encoded samples from their shards into one batch: one copy, from the mapped shard into the batch's memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stack.data import layout
from stack.data.layout import Slot
from stack.data.safety import DecodeError
from stack.data.shards import ShardReader
from stack.data.tar import HEADER_BYTES, is_header_of
from stack.text.conditioning import Pad, TextBatch

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_PADDED = ("t5", "t5_scale", "clip_l", "clip_g")  # their first side is the caption's length


class _Part(NamedTuple):
    name: str  # without the caption's number
    slot: Slot


class _Sample(NamedTuple):
    """The tensors of one caption, in the order they stand in; what is the same for all samples of a batch; bytes."""

    parts: tuple[_Part, ...]
    form: tuple[tuple[str, str, tuple[int, ...]], ...]
    size: int


def _find(header: bytes, caption: int) -> _Sample:
    """Raises DecodeError."""
    found = layout.parse(header)
    suffix = f".{caption}" if caption else ""
    listed = []
    for name, slot in found.slots.items():
        base, _, number = name.partition(".")
        if base.startswith("latent_") or int(number or 0) == caption:
            listed.append(_Part(base, slot))
    if f"pooled{suffix}" not in found.slots:
        raise DecodeError(f"no caption {caption}")
    parts = tuple(sorted(listed, key=lambda part: part.slot.start))
    form = tuple((name, slot.dtype, slot.shape[name in _PADDED :]) for name, slot in parts)
    return _Sample(parts, form, found.size)


# Samples of one bucket and one caption length have the same header to the last byte. These are 30 MB when there are
# several captions, whose lengths make nearly every header another; those of one caption all have room.
_find_known = lru_cache(maxsize=8192)(_find)


def read(reader: ShardReader, places: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """The tensors of some samples, each given as (shard, row, caption): [B, …] by name, padded with zeros.

    Beside those of `schema`, t5_length and clip_length: true tokens of each caption [B]. Memory is taken once, and each
    tensor copied once into its row of the batch. Raises UserError where a shard is not what was indexed,
    or samples don't go together.
    """
    samples: list[_Sample] = []
    members: list[memoryview] = []
    for shard, row, caption in places:
        index, view = reader.indices[shard], reader.view(shard)
        offset, length = index.span(row, "safetensors")
        member, name = view[offset : offset + length], index.key_bytes(row) + b".safetensors\0"
        block = view[max(0, offset - HEADER_BYTES) : offset]
        if block[: len(name)] != name and not is_header_of(bytes(block), index.key(row), "safetensors", length):
            raise reader.cut(shard)
        header = bytes(member[: layout.header_bytes(member[:8])])
        try:
            found = (_find_known if len(header) <= layout.HEAD_BYTES else _find)(header, caption)
        except DecodeError:
            raise reader.cut(shard) from None
        if found.size != length or (samples and found.form != samples[0].form):
            raise reader.cut(shard)
        samples.append(found)
        members.append(member)

    tensors, rows = _allocate(samples)
    for member, found, own in zip(members, samples, rows, strict=True):
        for (_, slot), row_bytes in zip(found.parts, own, strict=True):
            size = slot.stop - slot.start
            row_bytes[:size] = member[slot.start : slot.stop]
            if size < len(row_bytes):
                row_bytes[size:] = bytes(len(row_bytes) - size)
    for encoder in ("t5", "clip_l", "clip_g"):
        if encoder in tensors:
            lengths = [part.slot.shape[0] for found in samples for part in found.parts if part.name == encoder]
            tensors["t5_length" if encoder == "t5" else "clip_length"] = torch.tensor(lengths)
    return tensors


def _allocate(samples: list[_Sample]) -> tuple[dict[str, Tensor], list[tuple[memoryview, ...]]]:
    """Tensors for a batch [B, …], and each sample's rows of them as bytes."""
    tensors, columns = {}, []
    for number, (name, slot) in enumerate(samples[0].parts):
        shape = slot.shape
        if name in _PADDED:
            shape = max(found.parts[number].slot.shape[0] for found in samples), *shape[1:]
        tensors[name] = torch.empty((len(samples), *shape), dtype=_DTYPES[slot.dtype])
        view = memoryview(tensors[name].view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
        step = len(view) // len(samples)
        columns.append([view[at * step : (at + 1) * step] for at in range(len(samples))])
    return tensors, list(zip(*columns, strict=True))


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
