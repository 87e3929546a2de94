"""Map-style data sets over indexed shards. An item is addressed by a `Draw` (step, position, sample id) of the plan.

Shapes: B batch · C channels · H W height, width (pixels of an image, or positions of a latent).
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stack import dist
from stack.config import Config, UserError
from stack.data.buckets import BucketRule, buckets_for
from stack.data.images import decode_image, to_bucket
from stack.data.plan import BatchPlan, Draw, StepSampler
from stack.data.safety import DecodeError, Rejected, RejectLog
from stack.data.schema import EncodedSample, load_manifest, sample_from_bytes
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.log import say
from stack.text.conditioning import TextBatch, collate


class DataConfig(Config):
    """What both kinds of data have."""

    batch_size: PositiveInt = 64
    """Global: over all ranks and micro-batches."""
    validation_share: float = Field(default=0.03, ge=0, lt=1)
    """Samples held out for validation, chosen by a hash of their key; at most max_validation."""
    max_validation: NonNegativeInt = 512
    workers: NonNegativeInt = 0
    """Loader processes a rank."""


class LatentData(DataConfig):
    kind: Literal["latents"] = "latents"
    path: Path
    """Folder of a finished `mmdit preencode`."""


class ImageData(DataConfig):
    kind: Literal["images"] = "images"
    source: str
    """Raw shards: a folder, a .tar or a glob."""
    index: Path | None = None
    """Folder for the shards' indices; beside the shards if not given."""
    resolution: PositiveInt = 32


@dataclass
class LatentBatch:
    step: int
    positions: list[int]
    keys: list[str]
    mean_BCHW: Tensor
    logvar_BCHW: Tensor
    text: TextBatch

    def to(self, device: torch.device) -> LatentBatch:
        return replace(
            self,
            mean_BCHW=self.mean_BCHW.to(device, torch.float32),
            logvar_BCHW=self.logvar_BCHW.to(device, torch.float32),
            text=self.text.to(device),
        )


@dataclass
class ImageBatch:
    step: int
    positions: list[int]
    keys: list[str]
    image_BCHW: Tensor
    """In −1…1."""

    def to(self, device: torch.device) -> ImageBatch:
        return replace(self, image_BCHW=self.image_BCHW.to(device))


class Item(NamedTuple):
    draw: Draw
    key: str
    value: Any


def _leave_signals_to_the_rank(worker: int) -> None:
    """A cluster signals every process of a step; a worker that died of it would take the agreed save with it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ShardData(Dataset):
    """Shards with their plan: training samples and a held-out share for validation."""

    def __init__(self, shards: ShardSet, buckets: np.ndarray, lengths: np.ndarray, config: DataConfig, seed: int):
        self.shards = shards
        self._reader = ShardReader(shards.indices)
        self.config = config
        names = (key for index in shards.indices for key in index.keys.tolist())
        hashes = np.array([zlib.crc32(name.encode(errors="surrogateescape")) for name in names], dtype=np.int64)
        lowest = np.argsort(hashes, kind="stable")[: config.max_validation]
        chosen = lowest[hashes[lowest] < int(config.validation_share * 2**32)]
        self._validation = chosen[np.argsort(buckets[chosen], kind="stable")]
        self._held_out = np.zeros(shards.num_samples, dtype=bool)
        self._held_out[chosen] = True
        self._train = np.flatnonzero(~self._held_out)
        if len(self._train) == 0:
            raise UserError("data: no training samples; check the shards, or lower data.validation_share")
        self._buckets = buckets
        self.plan = BatchPlan(buckets[self._train], lengths[self._train], config.batch_size, seed)

    @property
    def num_samples(self) -> int:
        """Training samples, an epoch."""
        return len(self._train)

    def _load(self, sample: int) -> Any:
        raise NotImplementedError

    def _item(self, draw: Draw, sample: int) -> Item:
        return Item(draw, self.shards.key(sample), self._load(sample))

    def collate(self, items: Sequence[Item]) -> Any:
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Item:
        return self._item(draw, int(self._train[draw.sample_id]))

    def loader(self, start: int, stop: int, rank: int, world: int, micro_batches: int) -> Iterable[Any]:
        """This rank's micro-batches of steps start…stop, `micro_batches` a step."""
        sampler = StepSampler(self.plan, start, stop, rank, world, micro_batches)
        return DataLoader(
            self,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.config.workers,
            worker_init_fn=_leave_signals_to_the_rank,
        )

    def validation(self, batch_size: int) -> Iterator[Any]:
        """The held-out samples in a fixed order, batches of one bucket; positions count over the whole set."""
        start = 0
        while start < len(self._validation):
            bucket = self._buckets[self._validation[start]]
            stop = start + 1
            while (
                stop < min(start + batch_size, len(self._validation))
                and self._buckets[self._validation[stop]] == bucket
            ):
                stop += 1
            yield self.collate([self._item(Draw(0, i, i), int(self._validation[i])) for i in range(start, stop)])
            start = stop


class LatentDataset(ShardData):
    """Pre-encoded samples."""

    def __init__(self, config: LatentData, seed: int):
        self.folder = config.path
        self.manifest = load_manifest(config.path)
        shards = ShardSet(index_shards(config.path))
        self.manifest.check_shards(config.path, {index.path.name: len(index) for index in shards.indices})
        factor = self.manifest.latent_factor
        sides = [(width // factor, height // factor) for width, height in self.manifest.buckets]
        buckets = np.array([sides.index((w, h)) for w, h in zip(shards.width, shards.height, strict=True)])
        super().__init__(shards, buckets, shards.caption_length, config, seed)

    def _load(self, sample: int) -> EncodedSample:
        return sample_from_bytes(self._reader.read(*self.shards.locate(sample), "safetensors"))

    def collate(self, items: Sequence[Item]) -> LatentBatch:
        return LatentBatch(
            step=items[0].draw.step,
            positions=[item.draw.position for item in items],
            keys=[item.key for item in items],
            mean_BCHW=torch.stack([item.value.latent_mean for item in items]),
            logvar_BCHW=torch.stack([item.value.latent_logvar for item in items]),
            text=collate([item.value.text for item in items], self.manifest.pad),
        )


class ImageDataset(ShardData):
    """Raw images, resized and cropped to their buckets."""

    def __init__(self, config: ImageData, seed: int, rejected: RejectLog | None = None):
        self._log = rejected
        self._listed: set[tuple[str, str]] = set()
        shards = ShardSet(index_shards(config.source, config.index))
        if dist.rank() == 0:
            for index in shards.indices:
                for broken in index.rejected:
                    self._reject(index.path.name, broken)
        self._rule: BucketRule = buckets_for(config.resolution)
        self.sides = self._rule.buckets
        if not shards.width.all() or any("safetensors" in index.lengths for index in shards.indices):
            raise UserError(f"data.source: {config.source} holds pre-encoded shards; name raw ones")
        buckets = self._rule.assign(shards.width, shards.height)
        super().__init__(shards, buckets, np.zeros(len(buckets), np.int64), config, seed)

    def _load(self, sample: int) -> Tensor:
        """[3, H, W] in −1…1. An image whose pixels are broken is listed, and the next one of its bucket stands in."""
        for candidate in self._candidates(sample):
            shard, row = self.shards.locate(candidate)
            index = self.shards.indices[shard]
            try:
                image = decode_image(self._reader.read(shard, row, index.image_extension(row)))
            except DecodeError as error:
                self._reject(index.path.name, Rejected(str(index.keys[row]), str(error)))
                continue
            pixels = to_bucket(image, self._rule.buckets[self._buckets[sample]])
            return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        raise UserError(f"{self.shards.indices[0].path.parent}: not one image of a bucket can be decoded")

    def _candidates(self, sample: int) -> Iterator[int]:
        yield sample
        same_half = self._held_out == self._held_out[sample]
        alike = np.flatnonzero((self._buckets == self._buckets[sample]) & same_half)
        yield from np.roll(alike, -int(np.searchsorted(alike, sample)) - 1).tolist()

    def _reject(self, shard: str, rejected: Rejected) -> None:
        if (shard, rejected.key) not in self._listed:
            self._listed.add((shard, rejected.key))
            if self._log is not None:
                self._log.add(shard, rejected.key, rejected.reason)
            say(f"{shard}: {rejected.key}: {rejected.reason}: left out")

    def collate(self, items: Sequence[Item]) -> ImageBatch:
        return ImageBatch(
            step=items[0].draw.step,
            positions=[item.draw.position for item in items],
            keys=[item.key for item in items],
            image_BCHW=torch.stack([item.value for item in items]),
        )
