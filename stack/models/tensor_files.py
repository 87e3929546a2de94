"""Tensors by name, out of one safetensors file or several, and into them, one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stack.config import UserError, refusal
from stack.files import probe, publish

STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and others call a folder's weights."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As a safetensors header names them."""


class TensorSource:
    """The tensors of a .safetensors file, or of the one or many in a folder. Raises UserError for what is neither."""

    def __init__(self, path: Path):
        self.path = path
        self._open: tuple[Path, Any] | None = None
        self._taken: set[str] = set()
        self._file_of = self._find()
        self.names = frozenset(self._file_of)

    def _find(self) -> dict[str, Path]:
        if self.path.is_file():
            return dict.fromkeys(self._handle(self.path).keys(), self.path)
        for stem in STEMS:
            whole, index = self.path / f"{stem}.safetensors", self.path / f"{stem}.safetensors.index.json"
            if whole.is_file():
                return dict.fromkeys(self._handle(whole).keys(), whole)
            if index.is_file():
                try:
                    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                    return {name: self.path / Path(file).name for name, file in places.items()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{index}: not an index of safetensors files: {error!r}") from None
        raise UserError(
            f"{self.path}: no weights; expected a .safetensors file, or a folder with {STEMS[0]}.safetensors"
        )

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._open is None or self._open[0] != file:
            try:
                probe(file)
                self._open = file, safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise refusal(error, f"{file}: cannot be read as safetensors: {error}") from None
        return self._open[1]

    def _holder(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        return self._handle(self._file_of[name])

    @property
    def metadata(self) -> dict[str, str]:
        """Of the first file's header."""
        return self._handle(next(iter(self._file_of.values()))).metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._holder(name).get_slice(name).get_shape())

    def take(self, name: str) -> Tensor:
        self._taken.add(name)
        return self._holder(name).get_tensor(name)

    def check_all_taken(self, beside: tuple[str, ...] = ()) -> None:
        """UserError where tensors are left, but for names that begin with one of `beside`."""
        rest = sorted(name for name in self.names - self._taken if not name.startswith(beside or ("\0",)))
        if rest:
            raise UserError(f"{self.path}: {len(rest)} tensors that the model has no place for, first {rest[0]!r}")


class Pending(NamedTuple):
    """A tensor that is made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_file(path: Path, tensors: Sequence[Pending], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """A safetensors file: eight bytes with the length of its header, the header, and the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, shape, _ in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with publish(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            made = tensor.make().to("cpu", dtype)
            assert made.shape == tensor.shape
            file.write(made.contiguous().view(torch.uint8).numpy().data)


def write_folder(
    folder: Path, tensors: Sequence[Pending], dtype: torch.dtype, metadata: Mapping[str, str], shard_bytes: int
) -> None:
    """One file, or several of at most `shard_bytes` each with the index that diffusers reads, in place of others."""
    sizes = [math.prod(tensor.shape) * dtype.itemsize for tensor in tensors]
    shards: list[list[Pending]] = [[]]
    used = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    whole, index = folder / f"{STEMS[0]}.safetensors", folder / f"{STEMS[0]}.safetensors.index.json"
    stale = {whole, index, *folder.glob(f"{STEMS[0]}-*-of-*.safetensors")}
    if len(shards) == 1:
        write_file(whole, tensors, dtype, metadata)
        stale -= {whole}
    else:
        file_of: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"{STEMS[0]}-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(folder / name, shard, dtype, metadata)
            file_of.update((tensor.name, name) for tensor in shard)
        with publish(index) as temporary:
            temporary.write_text(
                json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": file_of}, indent=2), encoding="utf-8"
            )
        stale -= {index, *(folder / name for name in file_of.values())}
    for path in stale:  # of the other form or cut: readers would take them for this model's
        path.unlink(missing_ok=True)
