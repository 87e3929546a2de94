"""The rows of the loaders' benchmark: who is measured on what, and against which target."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from captions import LONG_TOKENS, T5, long_captions, read_captions, some_captions, timed, token_lengths
from contenders import BATCH, PREPARATIONS, ROOT
from pairs import Row, side_by_side
from peers import NotInstalledError, Worker, interpreter
from samples import FLOAT8_T5, FORMS, flux_bytes, our_bytes, write_shards

DATA = ROOT.parent / "shared" / "data"
TARGETS: dict[str, Mapping[str, float | None]] = {  # times faster than the peer, by size
    "webdataset": {"0.2 MB": 10.0, "0.6 MB": 10.0, "2 MB": 5.0},
    "webdataset a member a sample": dict.fromkeys(FORMS, None),
    "webdataset on our shards": dict.fromkeys(FORMS, None),
    "litdata": dict.fromkeys(FORMS, 1.2),
    "mosaicml-streaming": dict.fromkeys(FORMS, 5.0),
    "mosaicml-streaming by index": dict.fromkeys(FORMS, 5.0),
    "webshart": dict.fromkeys(FORMS, 2.0),
}
PAIRS, TEXT_PAIRS = 9, 5
EMOJI, LONG = "emoji's captions", f"captions of {LONG_TOKENS} tokens"


def _data(name: str) -> Path:
    if not (folder := DATA / name).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder: these rows need its shards")
    return folder


class Benchmark:
    """All rows; what several of them need is made when the first one asks. Use `close`."""

    def __init__(self, work: Path, peers: Path, quick: bool):
        self._work, self._peers, self._quick = work, peers, quick
        self._source: Path | None = None
        self._ours: Worker | None = None

    def run(self, name: str) -> Row:
        try:
            return self.rows[name](name)
        except FileNotFoundError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return Row(name, None, "no data", None, None, "", 0)

    @cached_property
    def rows(self) -> dict[str, Callable[[str], Row]]:
        """By name, in the order of the report."""
        rows: dict[str, Callable[[str], Row]] = {}
        for size in FORMS:
            for peer in TARGETS:
                rows[f"samples of {size} / {peer}"] = partial(self._samples, size, peer)
            rows[f"samples of {size}: share of a plain read"] = partial(self._share, size)
        rows["JPEG / webdataset"] = partial(self._images, "webdataset", 1.0)
        rows["JPEG / litdata"] = partial(self._images, "litdata", 1.0)
        for kind in (EMOJI, LONG):
            rows[f"T5, {kind} / padded to 256"] = partial(self._text, kind)
        rows["T5, largest difference / padded, masked"] = self._exactness
        rows["T5 in float8, relative error"] = self._float8
        for kind in (EMOJI, LONG):
            rows[f"bytes, {kind}, bfloat16 / FLUX"] = partial(self._bytes, kind, {}, 6.0)
            rows[f"bytes, {kind}, T5 in float8 / FLUX"] = partial(self._bytes, kind, FLOAT8_T5, 12.0)
        return rows

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()
            self._ours = None

    # ---- loaders

    def _samples(self, size: str, peer: str, name: str) -> Row:
        source, ours = self._open(size)
        return self._compare(name, "samples/s", ours, peer, source, TARGETS[peer][size])

    def _share(self, size: str, name: str) -> Row:
        source, ours = self._open(size)
        gigabytes = sum(path.stat().st_size for path in source.glob("*.tar")) / 1e9
        plain = Worker(interpreter("plain read", self._peers), "plain read", source, source)
        try:
            return side_by_side(name, ours.once, plain.once, gigabytes, "GB/s", None, self._pairs)
        finally:
            plain.close()

    def _images(self, peer: str, target: float | None, name: str) -> Row:
        source = _data("photos")
        ours = Worker(interpreter("ours", self._peers), "ours images", source, self._folder("photos"))
        try:
            return self._compare(name, "images/s", ours, f"{peer} images", source, target)
        finally:
            ours.close()

    def _compare(self, name: str, unit: str, ours: Worker, peer: str, source: Path, target: float | None) -> Row:
        truth = ours.check()
        copy = self._folder(f"{source.name} {peer}")
        try:
            other = Worker(interpreter(peer.split()[0], self._peers), peer, source, copy)
        except NotInstalledError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return Row(name, None, "not installed", None, target, unit, 0)
        try:
            if peer in PREPARATIONS:
                other.prepare()
            if (delivered := other.check()) != truth:
                raise RuntimeError(f"{peer} delivers {delivered}, ours {truth}")
            return side_by_side(name, ours.once, other.once, truth["samples"], unit, target, self._pairs)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return Row(name, None, "failed", None, target, unit, 0)
        finally:
            other.close()
            shutil.rmtree(copy)

    def _open(self, size: str) -> tuple[Path, Worker]:
        """The shards of a size and the reader of ours, kept until another size is wanted."""
        source = self._work / size
        if self._source != source or self._ours is None:
            self.close()
            if self._source is not None:
                shutil.rmtree(self._source)
            form = FORMS[size]
            print(f"writing samples of {size}", file=sys.stderr)
            write_shards(self._folder(size), form._replace(samples=2 * BATCH) if self._quick else form)
            self._source, self._ours = source, Worker(interpreter("ours", self._peers), "ours", source, source)
        return source, self._ours

    def _folder(self, name: str) -> Path:
        folder = self._work / name
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def _pairs(self) -> int:
        return 1 if self._quick else PAIRS

    # ---- text

    def _text(self, kind: str, name: str) -> Row:
        captions = self._captions[kind]
        ours, padded = timed(self._t5.ours, captions), timed(self._t5.padded, captions)
        pairs = 1 if self._quick else TEXT_PAIRS
        return side_by_side(name, ours, padded, len(captions), "captions/s", 4.5, pairs)

    def _exactness(self, name: str) -> Row:
        difference = max(self._t5.largest_difference(captions) for captions in self._captions.values())
        return Row(name, difference, None, None, 1e-5, "absolute", 0)

    def _float8(self, name: str) -> Row:
        error = self._t5.float8_error([caption for captions in self._captions.values() for caption in captions])
        return Row(name, error, None, None, None, "relative", 0)

    @cached_property
    def _t5(self) -> T5:
        return T5(self._work / "encoders")

    @cached_property
    def _emoji(self) -> list[str]:
        return read_captions(_data("emoji"))

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        few, many = (4, 8) if self._quick else (64, 96)
        return {EMOJI: some_captions(self._emoji, many), LONG: long_captions(self._emoji, few)}

    # ---- bytes

    def _bytes(self, kind: str, options: dict[str, Any], target: float, name: str) -> Row:
        """`options` of the writer."""
        unit, theirs = "bytes/sample", flux_bytes()
        ours = our_bytes(self._folder("bytes"), self._lengths(kind), **options)
        return Row(name, ours, theirs, theirs / ours, target, unit, 0)

    def _lengths(self, kind: str) -> list[int]:
        return token_lengths(self._emoji) if kind == EMOJI else [LONG_TOKENS]
