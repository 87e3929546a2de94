"""From the samples of one shard to encoded ones: threads read and decode ahead of the encoders, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from autoencoders.codec import Codec
from stack import dist
from stack.config import UserError
from stack.data import mlperf
from stack.data.buckets import BucketRule, fit
from stack.data.images import decode_image, to_bucket
from stack.data.safety import DecodeError, EmptyCaptionError, Rejected, check_caption
from stack.data.schema import EncodedSample, text_tensors
from stack.data.shards import ShardReader
from stack.text.encoders import TextEncoders

if TYPE_CHECKING:
    from stack.preencode.job import PreencodeConfig

CHUNK_BATCHES = 4
"""Batches whose captions are sorted by length together."""


class Raw(NamedTuple):
    """A decoded sample. captions: one a name, None for one that it lacks.  ready: one that came encoded."""

    key: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    captions: list[str | None]
    bucket: int
    facts: dict[str, Any]
    ready: EncodedSample | None = None


Item = Raw | Rejected
Outcome = tuple[Raw, EncodedSample] | Rejected


class Encoders:
    """The frozen networks, on this process's device. seconds: spent inside them so far."""

    def __init__(self, config: PreencodeConfig):
        self.device = dist.device()
        self.dtype = dist.frozen_dtype(self.device)
        self.codec = Codec.load(config.autoencoder, self.dtype).to(self.device)
        self.text = TextEncoders(config.text, self.device, self.dtype)
        self.rule = config.buckets.rule()
        self.batch_size = config.batch_size
        self.seconds = 0.0
        odd = [side for bucket in self.rule.buckets for side in bucket if side % self.codec.factor]
        if odd:
            raise UserError(
                f"buckets: a side of {odd[0]} pixels is not divisible by the autoencoder's factor {self.codec.factor}"
            )

    def encode(self, items: list[Item]) -> list[Outcome]:
        """What becomes of some samples, in order; those that were rejected before stay so."""
        began = time.monotonic()
        encoded = iter(self._encode([item for item in items if isinstance(item, Raw)]))
        outcomes: list[Outcome] = []
        for item in items:
            if isinstance(item, Rejected):
                outcomes.append(item)
                continue
            sample = next(encoded)
            if not _is_finite(sample):
                outcomes.append(Rejected(item.key, "encoded to values that are not finite"))
            else:
                outcomes.append((item, sample))
        self.seconds += time.monotonic() - began
        return outcomes

    @torch.inference_mode()
    def _encode(self, chunk: list[Raw]) -> list[EncodedSample]:
        moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        fresh = [i for i, raw in enumerate(chunk) if raw.ready is None]
        for bucket in sorted({chunk[i].bucket for i in fresh}):
            members = [i for i in fresh if chunk[i].bucket == bucket]
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                pixels = torch.from_numpy(np.stack([chunk[i].pixels for i in rows])).to(self.device)
                image_BCHW = pixels.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
                mean, logvar = self.codec.encode(image_BCHW)
                moments.update({i: (mean[row].cpu(), logvar[row].cpu()) for row, i in enumerate(rows)})
        present = [caption for i in fresh for caption in chunk[i].captions if caption is not None]
        encoded = iter(self.text.encode(present))
        samples: list[EncodedSample] = []
        for i, raw in enumerate(chunk):
            if raw.ready is not None:
                samples.append(raw.ready)
            else:
                texts = [None if caption is None else next(encoded) for caption in raw.captions]
                samples.append(EncodedSample(*moments[i], texts))
        return samples


def _is_finite(sample: EncodedSample) -> bool:
    tensors = [sample.latent_mean, sample.latent_logvar]
    tensors += [tensor for text in sample.texts if text is not None for tensor in text_tensors(text).values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def read_samples(
    config: PreencodeConfig, rule: BucketRule, reader: ShardReader, shard: int, rows: Iterable[int] | None = None
) -> Iterator[Item]:
    """The samples of one source shard, or of some of its rows, in order; decoded by threads, a few batches ahead."""
    index = reader.indices[shard]
    if not len(index):
        return
    reader.handle(shard)  # opened (fetched, if remote) once: the threads below only read by offset

    def load(row: int) -> Item:
        key, width, height = index.key(row), int(index.width[row]), int(index.height[row])
        if min(width, height) < config.min_side:
            return Rejected(key, f"smaller than min_side: {width}×{height} pixels")
        bucket = int(rule.assign(width, height))
        side = rule.buckets[bucket]
        try:
            if index.has(row, mlperf.EXTENSIONS[0]):
                return _ready(reader, shard, row, bucket, side)
            captions = _captions(config.captions, reader, shard, row)
            pixels = to_bucket(decode_image(reader.read(shard, row, index.image_extension(row))), side)
        except DecodeError as error:
            return Rejected(key, str(error))
        _, (left, top, *_) = fit(width, height, side)
        facts: dict[str, Any] = {"caption": captions[0], "bucket": list(side), "crop": [left, top]}
        facts |= {"width": width, "height": height}
        if len(captions) > 1:
            facts["captions"] = {name: c for name, c in zip(config.captions, captions, strict=True) if c is not None}
        return Raw(key, pixels, captions, bucket, facts)

    ahead = 2 * CHUNK_BATCHES * config.batch_size
    with ThreadPoolExecutor(max(1, config.decoders)) as threads:
        order = iter(range(len(index)) if rows is None else rows)
        pending = deque(threads.submit(load, row) for row in islice(order, ahead))
        try:
            while pending:
                item = pending.popleft().result()
                for row in islice(order, 1):
                    pending.append(threads.submit(load, row))
                yield item
        finally:
            for future in pending:
                future.cancel()


def _ready(reader: ShardReader, shard: int, row: int, bucket: int, side: tuple[int, int]) -> Item:
    index = reader.indices[shard]
    key, size = index.key(row), (int(index.width[row]), int(index.height[row]))
    if size != side:
        return Rejected(key, f"encoded at {size[0]}×{size[1]} pixels, which is no bucket")
    sample = mlperf.decode({extension: reader.read(shard, row, extension) for extension in mlperf.EXTENSIONS})
    caption = reader.fields(shard, row).get("caption")
    return Raw(key, np.empty(0, np.uint8), [], bucket, {"caption": caption, "bucket": list(side)}, sample)


def _captions(places: dict[str, str], reader: ShardReader, shard: int, row: int) -> list[str | None]:
    """One caption a name, None for one that is absent or empty; the first must be there. Raises DecodeError."""
    fields = reader.json(shard, row) if any(place != "txt" for place in places.values()) else {}
    captions: list[str | None] = []
    for place in places.values():
        try:
            caption = _caption_of(place, fields) if place != "txt" else reader.caption(shard, row)
            if caption is None:
                raise EmptyCaptionError(no_caption(place))
            captions.append(caption)
        except EmptyCaptionError:
            if not captions:
                raise
            captions.append(None)
    return captions


_KINDS = {
    list: "a list",
    dict: "an object",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _caption_of(place: str, fields: Any) -> str:
    """The caption in a field of KEY.json. Raises DecodeError, EmptyCaptionError if there is none."""
    name = place.removeprefix("json.")
    if not isinstance(fields, dict):
        raise DecodeError(f"no caption: KEY.json is {_KINDS[type(fields)]}, expected an object with {name!r}")
    if name not in fields:
        raise EmptyCaptionError(no_caption(place))
    value = fields[name]
    if isinstance(value, str):
        return check_caption(value)
    reason = f"no caption: {place} is {_KINDS[type(value)]}, expected text"
    raise EmptyCaptionError(reason) if value is None else DecodeError(reason)


def no_caption(place: str) -> str:
    """Why a sample is left out whose first caption is not at `place`."""
    return f"no caption: {place} is missing"


def overlapped(items: Iterator[Item], encoders: Encoders, chunk_size: int) -> Iterator[list[Outcome]]:
    """What becomes of the items, in order, a chunk at a time.

    The encoders run in a thread of their own, a chunk ahead, so that what the caller does with a chunk (serialise,
    write) takes none of their time.
    """
    with ThreadPoolExecutor(1) as thread:
        ahead: Future[list[Outcome]] | None = None
        while chunk := list(islice(items, chunk_size)):
            following = thread.submit(encoders.encode, chunk)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
