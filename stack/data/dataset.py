"""Map-style data sets over indexed shards. An item is a micro-batch, addressed by the `Draw`s of the plan.

Shapes: B batch · C channels · H W height, width (pixels of an image, or positions of a latent).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stack import dist
from stack.config import Config, Location, UserError
from stack.data import latents, mlperf
from stack.data.buckets import BucketConfig, BucketRule, unfilled
from stack.data.identity import DataIdentity
from stack.data.images import to_pixels
from stack.data.index import ShardIndex
from stack.data.partners import Partners
from stack.data.plan import WINDOW, BatchPlan, Draw, StepSampler
from stack.data.remote import CacheConfig, ShardCache, Stat, is_remote
from stack.data.safety import DecodeError, Rejected, RejectLog, check_kinds, entry, kinds_of
from stack.data.samples import TrainingSamples
from stack.data.schema import load_manifest
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.data.table import ShardTable
from stack.log import say
from stack.shown import printable, redact
from stack.text.conditioning import TextBatch

Mixture = Location | dict[Location, PositiveFloat]
"""One data set, or several with their weights."""


_SMALL_BATCH = 2**16  # samples; a batch of so many may be larger than its data set, and takes several epochs
_NEAR = 1024  # ids after a broken sample that are looked at one by one, before whole shards are
_MAX_SAID = 100  # broken samples that a process names on the console
Accept = Callable[[DataIdentity], None]
"""Is called with the identity of the data; raises UserError where the data must not be used."""
_FACTS = {"encoders", "pad", "captions", "scale", "shift", "latent_factor", "empty_caption", "dtype", "t5_dtype"}


class DataConfig(Config):
    """What both kinds of data have."""

    batch_size: int = Field(default=64, ge=1, le=2**22)
    """Global: over all ranks and micro-batches."""
    window: PositiveInt = WINDOW
    """About how many samples are permuted among each other, a few shards' worth: they are read in one go."""
    validation_share: float = Field(default=0.03, ge=0, lt=1)
    """Samples held out for validation, chosen by a hash of their key; at most max_validation."""
    max_validation: NonNegativeInt = 512
    max_rejected: float = Field(default=0.05, ge=0, le=1)
    """Share of the samples that may be broken; above it the run stops."""
    workers: NonNegativeInt = 0
    """Loader processes a rank."""
    index: Path | None = None
    """Folder for the shards' indices; beside the shards if not given."""
    cache: CacheConfig = CacheConfig()
    """Where remote shards are kept on this node."""


class LatentData(DataConfig):
    kind: Literal["latents"] = "latents"
    path: Mixture
    """Folder or URL of a finished `mmdit preencode`, or several with weights: {runs/a: 0.7, runs/b: 0.3}."""
    captions: dict[str, PositiveFloat] | None = None
    """Weights of the captions that pre-encoding kept, by name; all alike if not given."""


class ImageData(DataConfig):
    kind: Literal["images"] = "images"
    source: Mixture
    """Raw shards: a folder, a .tar, a glob or a URL; or several with weights."""
    buckets: BucketConfig = BucketConfig(resolution=32)
    channels: Literal[1, 3] = 3
    """3: RGB. 1: grey."""
    label: str | None = None
    """Key of KEY.json under which a sample's class stands, an integer from 0; no labels are read if not given."""
    paired: Location | None = None
    """Raw shards with a second image of each sample, of the same key: what a flow from images to images begins with."""


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
    label_B: Tensor | None = None
    """int64."""
    paired_BCHW: Tensor | None = None
    """The images of `data.paired`, in −1…1."""

    def to(self, device: torch.device) -> ImageBatch:
        label_B, paired_BCHW = (x if x is None else x.to(device) for x in (self.label_B, self.paired_BCHW))
        return replace(self, image_BCHW=self.image_BCHW.to(device), label_B=label_B, paired_BCHW=paired_BCHW)


def _leave_signals_to_the_rank(worker: int) -> None:
    """A cluster signals every process of a step; a worker that died of it would take the agreed save with it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """At exit multiprocessing sends SIGTERM, which these leave to the rank, and waits for ever."""
    for worker in workers:
        worker.kill()


class ShardData(Dataset):
    """Shards with their plan: training samples and a held-out share for validation.

    sides: (width, height) of the buckets, in pixels.  identity: what the batches are made of.
    accept: is called with the identity before anything else is done; it may raise UserError.
    """

    sides: Sequence[tuple[int, int]]
    identity: DataIdentity

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        sources: Mapping[str, float | None],
        caption_weights: Sequence[float],
        check: Callable[[str, ShardSet], None],
        accept: Accept,
        paired: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        """paired: a source of second images.  facts: what else decides the batches."""
        self.config = config
        self._cache = ShardCache(config.cache)
        sets = {source: self._indexed(source) for source in sources}
        for source, one in sets.items():
            check(source, one)
        self._paired = None if paired is None else self._indexed(paired)
        weights = sources if len(sources) > 1 else dict.fromkeys(sources)
        parts = [one.part("train", weights[source]) for source, one in sets.items()]
        parts += [self._paired.part("paired", None)] if self._paired is not None else []
        self.identity = DataIdentity(parts=parts, facts=dict(facts or {}))
        accept(self.identity)
        self.shards = ShardSet(ShardTable.joined([one.indices for one in sets.values()]))
        say_damage(self.shards.indices)
        self._refuse_many_rejected()
        self._reader = ShardReader(self.shards.indices, self._cache)
        ids, width, height = self.shards.held_out(config.max_validation, int(config.validation_share * 2**32))
        held_out = ids, self._bucket_of(width, height)
        tables, first = [], 0
        for source, weight in sources.items():
            own = range(first, first + len(sets[source].indices))
            first = own.stop
            table = TrainingSamples(
                self.shards, own, self._bucket_of, len(self.sides), held_out, weight, caption_weights
            )
            if not table.counts.any():
                raise UserError(
                    f"{redact(source)}: no training samples; check the shards, or lower data.validation_share"
                )
            tables.append(table)
        self._check_batch_size(tables)
        self._held_out = frozenset(ids.tolist())
        self._validation = ids[np.lexsort(held_out)].tolist()
        self._tables = tables
        self.plan = BatchPlan(tables, config.batch_size, seed, config.window)

    def _indexed(self, source: str) -> ShardSet:
        """Rank 0 looks at the shards; the others get what it has found."""
        return ShardSet(dist.on_first_rank(lambda: index_shards(source, self.config.index, self._cache)))

    def _check_batch_size(self, tables: Sequence[TrainingSamples]) -> None:
        """UserError for a batch that takes more samples than there are, and more memory than any sane one."""
        size, total = self.config.batch_size, sum(int(table.counts.sum()) for table in tables)
        if size > max(total, _SMALL_BATCH):
            raise UserError(f"data.batch_size={size} is more than the {total:,} training samples: lower it")

    def _bucket_of(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Index into `sides` of samples of these sizes, as their shards' indices tell them."""
        raise NotImplementedError

    def _batch(self, draws: Sequence[Draw]) -> Any:
        raise NotImplementedError

    def _bucket(self, sample: int) -> int:
        shard, row = self.shards.locate(sample)
        index = self.shards.index(shard)
        return int(self._bucket_of(index.width[row : row + 1], index.height[row : row + 1])[0])

    def _refuse_many_rejected(self) -> None:
        """UserError where the indices leave out too many samples. Rank 0 reads and lists these."""

        def listed() -> Counter[str]:
            kinds: Counter[str] = Counter()
            for index in self.shards.indices.of_some("rejected"):
                self._reject(index, index.rejected)
                kinds += kinds_of(index.rejected)
            return kinds

        self._check_budget(dist.on_first_rank(listed))

    def _reject(self, index: ShardIndex, rejected: Iterable[Rejected]) -> None:
        """Take note of samples that are left out."""

    def _check_budget(self, kinds: Counter[str]) -> None:
        check_kinds(kinds, self.shards.num_samples + self.shards.num_rejected, self.config.max_rejected)

    @property
    def num_samples(self) -> int:
        """Training samples, an epoch."""
        return self.plan.num_samples

    @property
    def num_held_out(self) -> int:
        return len(self._validation)

    def unfilled(self) -> list[str]:
        """A sentence on each bucket of which an epoch's training samples do not fill a batch."""
        tables = zip(self._tables, self.plan.quotas, strict=True)
        counts = np.sum([quota * table.counts.sum(0) / table.counts.sum() for table, quota in tables], axis=0)
        return unfilled(counts.tolist(), self.config.batch_size, BucketRule(buckets=tuple(self.sides)))

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        """One micro-batch (torch's loader asks for the samples of a batch at once), or the error that it met."""
        try:
            return self._batch(draws)
        except (UserError, OSError) as error:
            return error

    def loader(self, start: int, stop: int, rank: int, world: int, micro_batches: int) -> Iterator[Any]:
        """This rank's micro-batches of steps start…stop, `micro_batches` a step."""
        sampler = StepSampler(self.plan, start, stop, rank, world, micro_batches)
        if any(map(is_remote, self.shards.indices.urls)) and dist.local_rank() == 0:
            threading.Thread(target=self._fetch_ahead, args=(sampler,), daemon=True).start()
        return self._batches(sampler)

    def _batches(self, sampler: StepSampler) -> Iterator[Any]:
        batches = iter(
            DataLoader(
                self,
                batch_sampler=sampler,
                collate_fn=_as_it_is,
                num_workers=self.config.workers,
                worker_init_fn=_leave_signals_to_the_rank,
            )
        )
        if self.config.workers:
            Finalize(batches, _kill, (batches._workers,), exitpriority=0)  # type: ignore[attr-defined]
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _fetch_ahead(self, sampler: StepSampler) -> None:
        """Bring the shards of the window behind the sampler's into the node's cache while that one is trained on."""
        plan = BatchPlan(self._tables, self.plan.batch_size, self.plan.seed, self.config.window)  # of this thread alone
        firsts = np.cumsum([0, *(len(table.counts) for table in self._tables)])

        def remote_shards(window: int) -> list[ShardIndex]:
            shards = [self.shards.indices.facts(firsts[number] + shard) for number, shard in plan.shards_of(window)]
            return [index for index in shards if is_remote(index.url)]

        window, last = plan.window_of(sampler.steps.start), plan.window_of(max(sampler.steps, default=0))
        while True:
            near = range(window, min(window + 2, last + 1))
            size = sum({index.url: index.size for each in near for index in remote_shards(each)}.values())
            if size > self._cache.max_bytes:  # what is fetched ahead would push out what is being read
                what = "a window" if window >= last else "two windows"
                sizes = f"the shards of {what} have {size / 1e9:.6g} GB"
                holds = f"data.cache.max_gb={self._cache.max_bytes / 1e9:.6g}"
                say(f"{sizes}, more than {holds}: they may be fetched many times; raise it, or lower data.window")
                return
            if window >= last:
                return
            window += 1
            while plan.window_of(sampler.step) < window - 1:
                time.sleep(1)
            for index in remote_shards(window):
                try:
                    self._cache.fetch(index.url, Stat(index.size, index.version))
                except (UserError, OSError):
                    return  # whoever needs the shard says so

    def validation(self, batch_size: int) -> Iterator[Any]:
        """The held-out samples in a fixed order, batches of one bucket; positions count over the whole set."""
        start = 0
        while start < len(self._validation):
            bucket = self._bucket(self._validation[start])
            stop = start + 1
            while stop < min(start + batch_size, len(self._validation)):
                if self._bucket(self._validation[stop]) != bucket:
                    break
                stop += 1
            yield self._batch([Draw(0, at, self._validation[at], 0) for at in range(start, stop)])
            start = stop


def _as_it_is(batch: Any) -> Any:
    return batch


def say_damage(indices: Sequence[ShardIndex]) -> None:
    """Name the shards of which a part may be missing."""
    for index in ShardTable.of(indices).of_some("damaged"):
        say(f"{redact(index.url)}: shard {index.damage}: {len(index):,} samples of it are used")


def weights_of(mixture: Mixture) -> Mapping[str, float | None]:
    return {mixture: None} if isinstance(mixture, str) else mixture


class LatentDataset(ShardData):
    """Pre-encoded samples."""

    def __init__(self, config: LatentData, seed: int, accept: Accept = lambda identity: None):
        sources = weights_of(config.path)
        self.folder = next(iter(sources))
        manifests = {folder: load_manifest(folder) for folder in sources}
        self.manifest = manifests[self.folder]
        for folder, manifest in manifests.items():
            self.manifest.check_alike(self.folder, folder, manifest)
        self.sides = sorted({side for manifest in manifests.values() for side in manifest.buckets})
        factor = self.manifest.latent_factor
        known = {(width // factor, height // factor): at for at, (width, height) in enumerate(self.sides)}
        self._codes = np.array(sorted((w << 32) + h for w, h in known), np.int64)
        self._of_code = np.array([known[code >> 32, code & (2**32 - 1)] for code in self._codes.tolist()])

        def check(folder: str, shards: ShardSet) -> None:
            names, contents = map(shards.indices.texts, ("name", "sha256"))
            facts = zip(np.diff(shards.starts).tolist(), contents, strict=True)
            manifests[folder].check_shards(folder, dict(zip(names, facts, strict=True)))

        facts = self.manifest.model_dump(mode="json", include=_FACTS)
        facts["buckets"] = [list(side) for side in self.sides]
        super().__init__(config, seed, sources, self._caption_weights(config), check, accept, facts=facts)

    def _caption_weights(self, config: LatentData) -> list[float]:
        names = self.manifest.captions
        if config.captions is None:
            return [1.0] * len(names)
        for name in config.captions:
            if name not in names:
                raise UserError(
                    f"data.captions: {redact(self.folder)} has no caption {name!r}, it has {', '.join(names)}"
                )
        return [config.captions.get(name, 0.0) for name in names]

    def validation_captions(self) -> list[str]:
        """The first caption of each held-out sample, by position. UserError where one was encoded without its text."""
        captions = []
        for sample in self._validation:
            shard, row = self.shards.locate(sample)
            try:
                caption = json.loads(self._reader.read(shard, row, "json"))["caption"]
            except (ValueError, KeyError, TypeError, RecursionError):
                caption = None
            if not isinstance(caption, str):
                index = self.shards.index(shard)
                raise UserError(f"{redact(index.url)}: sample {printable(index.key(row))} keeps no caption as text")
            captions.append(caption)
        return captions

    def _bucket_of(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        codes = (width.astype(np.int64) << 32) + height
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        if not (self._codes[at] == codes).all():
            odd = int(np.flatnonzero(self._codes[at] != codes)[0])
            raise UserError(
                f"data.path: a latent of {width[odd]}×{height[odd]} cells is in none of the manifest's buckets"
            )
        return self._of_code[at]

    def _batch(self, draws: Sequence[Draw]) -> LatentBatch:
        ids = np.array([draw.sample_id for draw in draws])
        shards = np.searchsorted(self.shards.starts, ids, side="right") - 1
        rows = (ids - self.shards.starts[shards]).tolist()
        places = list(zip(shards.tolist(), rows, (draw.caption for draw in draws), strict=True))
        tensors = latents.read(self._reader, places)
        return LatentBatch(
            step=draws[0].step,
            positions=[draw.position for draw in draws],
            keys=[self.shards.index(shard).key(row) for shard, row, _ in places],
            mean_BCHW=tensors["latent_mean"],
            logvar_BCHW=tensors["latent_logvar"],
            text=latents.text_batch(tensors, self.manifest.pad),
        )


class ImageDataset(ShardData):
    """Raw images, resized and cropped to their buckets, with the labels and second images that `config` asks for.

    num_classes: which a label must be below; UserError where one is not.
    """

    def __init__(
        self,
        config: ImageData,
        seed: int,
        rejected: RejectLog | None = None,
        num_classes: int | None = None,
        accept: Accept = lambda identity: None,
    ):
        self._log, self._num_said = rejected or RejectLog(), 0
        self._rule = config.buckets.rule()
        self.sides = self._rule.buckets
        self.channels, self._label, self._num_classes = config.channels, config.label, num_classes

        def check(source: str, shards: ShardSet) -> None:
            _check_raw("source", source, shards)
            if config.label is not None and not any("json" in kind.extensions for kind in shards.indices.kinds):
                raise UserError(f"data.label={config.label}: {redact(source)} has no KEY.json, where labels stand")

        super().__init__(config, seed, weights_of(config.source), [1.0], check, accept, config.paired)
        self._partners: Partners | None = None
        if config.paired is not None and self._paired is not None:
            _check_raw("paired", config.paired, self._paired)
            self._partners = Partners(self._paired, ShardReader(self._paired.indices, self._cache))

    def _refuse_many_rejected(self) -> None:
        def begin() -> None:
            try:
                self._log.read()
                self._check_budget(self._log.kinds)
            except UserError:  # the list that ended the last life; repaired samples are no longer met
                self._log.clear()

        dist.on_first_rank(begin)
        super()._refuse_many_rejected()
        self._log.read()

    @property
    def has_labels(self) -> bool:
        return self._label is not None

    @property
    def has_pairs(self) -> bool:
        return self._partners is not None

    def _bucket_of(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        return self._rule.assign(width, height)

    def _load(self, sample: int) -> _Loaded:
        """For a sample that is broken the next one of its bucket stands in."""
        bucket = self._bucket(sample)
        for candidate in self._candidates(sample, bucket):
            shard, row = self.shards.locate(candidate)
            index = self.shards.index(shard)
            key = index.key(row)
            try:
                image = self._pixels(self._reader.read(shard, row, index.image_extension(row)), bucket)
                label = None if self._label is None else self._read_label(shard, row, self._label)
                paired = None if self._partners is None else self._pixels(self._partners.read(key), bucket)
            except DecodeError as error:
                self._reject(index, [Rejected(key, str(error))])
                self._check_budget(self._log.kinds)
                continue
            return _Loaded(key, image, label, paired)
        raise UserError(f"{redact(self.shards.indices[0].url)}: not one image of a bucket can be decoded")

    def _pixels(self, data: bytes, bucket: int) -> Tensor:
        """[C, H, W] in −1…1. Raises DecodeError."""
        return to_pixels(data, self.sides[bucket], self.channels)

    def _read_label(self, shard: int, row: int, name: str) -> int:
        label = self._reader.fields(shard, row).get(name)
        if label is None:
            raise DecodeError(f"no label: KEY.json has no {name!r}")
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise DecodeError(f"bad label: {name} is {printable(json.dumps(label))}, expected an integer from 0")
        if self._num_classes is not None and label >= self._num_classes:
            index = self.shards.index(shard)
            raise UserError(
                f"{redact(index.url)}: {printable(index.key(row))} has label {label}, and objective.classes="
                f"{self._num_classes} ends with {self._num_classes - 1}: raise it, or mend the data"
            )
        return label

    def _candidates(self, sample: int, bucket: int) -> Iterator[int]:
        """The sample, then those of its bucket that follow it, in its own half: training or held out."""
        yield sample
        held_out, total = sample in self._held_out, self.shards.num_samples
        for other in range(sample + 1, min(sample + _NEAR, total)):
            if (other in self._held_out) == held_out and self._bucket(other) == bucket:
                yield other
        for first, last in ((sample + _NEAR, total), (0, sample)):
            yield from self._between(first, last, bucket, held_out)

    def _between(self, first: int, last: int, bucket: int, held_out: bool) -> Iterator[int]:
        """The samples of one bucket and half among the ids first…last. Shards without any of them are not read."""
        if held_out:
            near = [sample for sample in self._validation if first <= sample < last]
            yield from (sample for sample in near if self._bucket(sample) == bucket)
            return
        for table in self._tables:
            for shard in np.flatnonzero(table.counts[:, bucket]).tolist():
                start, stop = self.shards.starts[table.shards.start + shard :][:2].tolist()
                if start < last and stop > first:
                    rows = table.rows(shard)
                    yield from rows.id[(rows.bucket == bucket) & (rows.id >= first) & (rows.id < last)].tolist()

    def _reject(self, index: ShardIndex, rejected: Iterable[Rejected]) -> None:
        where = redact(index.url)  # shards of a mixture may share a name
        for line in self._log.add_all(entry(where, *one) for one in rejected):
            self._num_said += 1
            if self._num_said <= _MAX_SAID:
                named = printable(f"{line['key']}: {line['reason']}")
                say(f"{index.name}: {named}: left out")
            elif self._num_said == _MAX_SAID + 1:
                say(f"{index.name}: further samples that are left out are listed in rejected.jsonl only")

    def _batch(self, draws: Sequence[Draw]) -> ImageBatch:
        keys, images, labels, paired = zip(*(self._load(draw.sample_id) for draw in draws), strict=True)
        return ImageBatch(
            step=draws[0].step,
            positions=[draw.position for draw in draws],
            keys=list(keys),
            image_BCHW=torch.stack(images),
            label_B=None if self._label is None else torch.tensor(labels),
            paired_BCHW=None if self._partners is None else torch.stack(paired),
        )


class _Loaded(NamedTuple):
    key: str
    image_CHW: Tensor
    label: int | None
    paired_CHW: Tensor | None


def _check_raw(name: str, source: str, shards: ShardSet) -> None:
    if any({"safetensors", mlperf.EXTENSIONS[0]} & {*kind.extensions} for kind in shards.indices.kinds):
        raise UserError(f"data.{name}: {redact(source)} holds pre-encoded shards; name raw ones")
