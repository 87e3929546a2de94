"""A contact sheet of what a model will see of a set of shards: one self-contained HTML page, no scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autoencoders.codec import Codec, fingerprint, to_uint8
from stack import dist
from stack.config import UserError
from stack.data import mlperf
from stack.data.buckets import BucketRule, fit
from stack.data.images import decode_image, to_bucket
from stack.data.info import encoded_folder
from stack.data.latents import read
from stack.data.remote import ShardCache
from stack.data.safety import DecodeError
from stack.data.schema import MANIFEST, Manifest, load_manifest
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.files import publish
from stack.shown import redact

_MAX_SIDE = 480  # pixels of an embedded original
_LOSSLESS = 256 * 256  # pixels of an image up to which it is embedded as PNG
_SMALL = 128  # pixels of a side below which single pixels are shown


@dataclass
class Picture:
    title: str
    url: str
    """A data: URL."""
    width: int
    """Of the image that it stands for, in pixels."""
    height: int
    frame: tuple[float, float, float, float] | None = None
    """Left, top, width and height of the crop, in per cent."""

    @property
    def small(self) -> bool:
        return max(self.width, self.height) < _SMALL


@dataclass
class Caption:
    name: str
    text: str
    length: str


@dataclass
class Card:
    """One sample of the sheet."""

    key: str
    shard: str
    pictures: list[Picture] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def choose(num_samples: int, count: int, seed: int) -> list[int]:
    """`count` different ids of 0 … num_samples − 1, or all of them, ascending. The same in every version of NumPy."""
    count, draws = min(count, num_samples), np.random.Philox(np.random.SeedSequence([seed]))
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[int(draws.random_raw()) % num_samples] = None
    return sorted(chosen)


def raw_cards(shards: ShardSet, cache: ShardCache, rule: BucketRule, ids: Sequence[int]) -> Iterator[Card]:
    """Raw samples: the original with the crop as a frame, and what is left of it in its bucket."""
    reader = ShardReader(shards.indices, cache)
    for sample in ids:
        shard, row = shards.locate(sample)
        index = shards.index(shard)
        card = Card(index.key(row), index.name)
        try:
            image = _image(reader, shard, row)
        except DecodeError as error:
            card.problem = str(error)
            yield card
            continue
        bucket = rule.buckets[int(rule.assign(image.width, image.height))]
        resized, (left, top, *_) = fit(image.width, image.height, bucket)
        parts = zip((left, top, *bucket), (*resized, *resized), strict=True)
        frame = tuple(100 * part / whole for part, whole in parts)
        card.pictures = [
            _picture("original", image, frame),
            _picture("as trained", Image.fromarray(to_bucket(image, bucket))),
        ]
        try:
            if (caption := reader.caption(shard, row)) is not None:
                card.captions = [Caption("txt", caption, f"{len(caption):,} characters")]
        except DecodeError as error:
            card.problem = str(error)
        kept = f"{100 * bucket[0] * bucket[1] / (resized[0] * resized[1]):.0f} %"
        card.facts = {**_sides(bucket, (left, top), image.size), "resized to": _by(*resized), "kept": kept}
        yield card


def encoded_cards(
    shards: ShardSet, cache: ShardCache, manifest: Manifest, codec: Codec, source: ShardSet | None, ids: Sequence[int]
) -> Iterator[Card]:
    """Pre-encoded samples: the decoded mean of the latent, and the original in its bucket if there is a `source`.

    Raises UserError where the source lacks a shard.
    """
    reader, originals = ShardReader(shards.indices, cache), _Originals(source, cache)
    for sample in ids:
        shard, row = shards.locate(sample)
        index = shards.index(shard)
        card = Card(index.key(row), index.name)
        tensors = read(reader, [(shard, row, 0)])
        try:
            facts = json.loads(reader.read(shard, row, "json"))
            bucket = (int(facts["bucket"][0]), int(facts["bucket"][1]))
            card.facts = {"bucket": _by(*bucket)}
            if "crop" in facts:  # a sample that came encoded (MLPerf's) has none
                size = int(facts["width"]), int(facts["height"])
                card.facts = _sides(bucket, (int(facts["crop"][0]), int(facts["crop"][1])), size)
            captions = dict(facts.get("captions") or {manifest.captions[0]: facts["caption"]})
        except (KeyError, TypeError, ValueError, IndexError) as error:
            card.problem = f"JSON not readable: {type(error).__name__}: {error}"
            yield card
            continue
        mean_BCHW = tensors["latent_mean"].to(dist.device(), torch.float32)
        with torch.inference_mode():
            pixels = to_uint8(codec.decode_raw(mean_BCHW).clamp(-1, 1))[0]
        decoded = Image.fromarray(pixels.numpy())
        try:
            original = originals.find(index.name, card.key)
            if original is not None:
                card.pictures = [_picture("as trained", Image.fromarray(to_bucket(original, bucket)))]
        except DecodeError as error:
            card.problem = str(error)
        card.pictures.append(_picture("decoded latent", decoded))
        lengths = index.caption_length[row].tolist()
        card.captions = [
            Caption(name, str(captions[name]), f"{length:,} tokens, {len(str(captions[name])):,} characters")
            for name, length in zip(manifest.captions, lengths, strict=False)
            if length >= 0 and captions.get(name) is not None
        ]
        yield card


def _image(reader: ShardReader, shard: int, row: int) -> Image.Image:
    """Raises DecodeError."""
    index = reader.indices[shard]
    if index.has(row, mlperf.EXTENSIONS[0]):
        raise DecodeError("already encoded, in MLPerf's layout: there is no image")
    return decode_image(reader.read(shard, row, index.image_extension(row)))


class _Originals:
    """Images of the raw shards, by key within the shard of the same name."""

    def __init__(self, source: ShardSet | None, cache: ShardCache) -> None:
        self._source = source
        if source is not None:
            self._reader = ShardReader(source.indices, cache)
            self._shards = {index.name: number for number, index in enumerate(source.indices)}
            self._rows: tuple[str, dict[str, int]] = ("", {})

    def find(self, shard: str, key: str) -> Image.Image | None:
        """None without a source. Raises DecodeError for an image that is broken or absent, UserError for a shard."""
        if self._source is None:
            return None
        if shard not in self._shards:
            raise UserError(f"--source: no shard {shard} there, which the pre-encoded set has")
        number = self._shards[shard]
        index = self._source.index(number)
        if self._rows[0] != shard:
            self._rows = shard, {name: row for row, name in enumerate(index.keys)}
        row = self._rows[1].get(key)
        if row is None:
            raise DecodeError(f"not in {redact(index.url)}")
        return _image(self._reader, number, row)


def preview(
    shards: str | Path,
    out: Path,
    count: int,
    seed: int,
    cache: ShardCache,
    folder: Path | None = None,
    rule: BucketRule | None = None,
    autoencoder: str | None = None,
    source: str | Path | None = None,
) -> int:
    """Write the sheet of `count` samples of `shards` to `out`; how many there are.

    Raw shards need a `rule`, pre-encoded ones the `autoencoder` that made them, and `source` for the originals.
    Raises UserError where one is missing or does not fit.
    """
    shown = redact(str(shards))
    found = ShardSet(index_shards(shards, folder, cache))
    if not len(found):
        raise UserError(f"{shown}: not one usable sample; look at the shards with `mmdit data lint`")
    ids = choose(len(found), count, seed)
    notes = {"samples": f"{len(ids):,} of {len(found):,}, chosen by seed {seed}"}
    if not any(index.encoded for index in found.indices):
        if rule is None:
            raise UserError(f"{shown}: raw shards need --resolution, which says how their images are cropped")
        if autoencoder is not None or source is not None:
            raise UserError(f"{shown}: raw shards take neither --autoencoder nor --source")
        notes["buckets"] = ", ".join(_by(*bucket) for bucket in rule.buckets)
        cards = list(raw_cards(found, cache, rule, ids))
    else:
        if rule is not None:
            raise UserError(f"{shown}: pre-encoded shards have the buckets of their {MANIFEST}: leave out --resolution")
        if autoencoder is None:
            raise UserError(f"{shown}: pre-encoded shards need --autoencoder, which decodes their latents")
        manifest = load_manifest(encoded_folder(found))
        made_by, named = manifest.encoders.get("autoencoder"), fingerprint(autoencoder)
        if made_by != named:
            raise UserError(f"--autoencoder: {autoencoder} has fingerprint {named}, {shown}/{MANIFEST} says {made_by}")
        raw = None if source is None else ShardSet(index_shards(source, folder, cache))
        notes |= {"autoencoder": str(autoencoder), "shown": "decoded means of the latents; training draws around them"}
        if raw is not None:
            alike = raw.fingerprint() == manifest.source
            notes["originals"] = redact(str(source)) + ("" if alike else ": other shards than the manifest's source")
        cards = list(encoded_cards(found, cache, manifest, Codec.load(autoencoder).to(dist.device()), raw, ids))
    with publish(out) as temporary:
        temporary.write_text(_page(shown, notes, cards), encoding="utf-8", errors="backslashreplace")
    return len(cards)


def _page(title: str, notes: dict[str, str], cards: list[Card]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("preview.html").render(title=title, notes=notes, cards=cards)


def _picture(title: str, image: Image.Image, frame: Any = None) -> Picture:
    """What is cropped is shown as it is, if need be by a very good JPEG; an original with its frame is made smaller."""
    width, height = image.size
    if frame is not None:
        image = image.copy()
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if image.width * image.height <= _LOSSLESS:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=92, subsampling=0)
    kind = "png" if image.width * image.height <= _LOSSLESS else "jpeg"
    return Picture(
        title, f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", width, height, frame
    )


def _sides(bucket: tuple[int, int], crop: Sequence[int], size: tuple[int, int]) -> dict[str, str]:
    return {"original": _by(*size), "bucket": _by(*bucket), "crop": f"left {crop[0]}, top {crop[1]}"}


def _by(width: int, height: int) -> str:
    return f"{width:,}×{height:,}"
