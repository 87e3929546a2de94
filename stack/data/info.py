"""What stands in a set of shards, told by their indices alone: counts, sizes, buckets, caption lengths.

Distributions are counted value by value while one index after the other is mapped, so memory grows with the number of
different values, not of samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stack.config import UserError
from stack.data import cuts, mlperf
from stack.data.buckets import BucketRule, histogram
from stack.data.cuts import Cut
from stack.data.index import without_query
from stack.data.remote import ShardCache
from stack.data.schema import MANIFEST, Manifest, load_manifest
from stack.data.shards import ShardSet, index_shards
from stack.shown import redact

_BAR = 40  # characters of a histogram's longest bar
_BINS = 12  # of a histogram, at most
_RATIOS = ("1:4", "1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1", "4:1")
_SHOWN_DIGITS = 12  # of a fingerprint


def describe(
    source: str | Path, folder: Path | None = None, cache: ShardCache | None = None, rule: BucketRule | None = None
) -> dict[str, Any]:
    """The facts of the shards of `source`, as `render` shows them and JSON can hold them.

    rule: count raw images by these buckets; pre-encoded shards have those of their manifest.

    Raises UserError where there is no shard, a shard changed since it was indexed, pre-encoded shards have no manifest,
    or a rule is given for them.
    """
    shards = ShardSet(index_shards(source, folder, cache))
    indices = shards.indices
    manifest = load_manifest(encoded_folder(shards)) if any(index.encoded for index in indices) else None
    if manifest is not None and rule is not None:
        raise UserError(f"{redact(str(source))}: pre-encoded shards have the buckets of their {MANIFEST}: name none")
    rejected = Counter(broken.reason.partition(":")[0] for index in indices for broken in index.rejected)
    bad_captions = Counter(why.partition(":")[0] for index in indices for why in index.bad_captions.values())
    further = Counter[tuple[str, str]]()
    for index in indices:
        further.update({(read, other): count for read, other, count in index.further_images})
    facts: dict[str, Any] = {
        "source": redact(str(source)),
        "shards": len(indices),
        "samples": len(shards),
        "bytes": sum(index.size for index in indices),
        "rejected": dict(rejected.most_common()),
        "bad_captions": dict(bad_captions.most_common()),
        "damaged": {index.name: index.damage for index in indices if index.damage},
        "strays": sum(index.num_strays for index in indices),
        "further_images": [[read, other, count] for (read, other), count in further.most_common()],
        "samples_per_shard": _summary(Counter(map(len, indices))),
        "bytes_per_sample": sum(index.size for index in indices) / max(1, len(shards)),
    }
    return facts | _columns(shards, manifest, rule) | ({} if manifest is None else {"manifest": _manifest(manifest)})


def encoded_folder(shards: ShardSet) -> str:
    """The one folder of pre-encoded shards. Raises UserError for several."""
    folders = sorted({without_query(index.url).rpartition("/")[0] or "." for index in shards.indices})
    if len(folders) > 1:
        raise UserError(f"{redact(folders[0])} and {redact(folders[1])}: name one pre-encoded folder at a time")
    return folders[0]


def _columns(shards: ShardSet, manifest: Manifest | None, rule: BucketRule | None) -> dict[str, Any]:
    """What takes the indices' columns, each read once."""
    factor = 1
    if manifest is not None:
        factor, rule = manifest.latent_factor, BucketRule(buckets=tuple(manifest.buckets))
    width, height, shorter = Counter[int](), Counter[int](), Counter[int]()
    members: dict[str, list[int]] = {}
    names = manifest.captions if manifest is not None else ["txt"]
    captions = {name: Counter[int]() for name in names}
    ratios = np.zeros(len(_RATIOS), np.int64)
    buckets = np.zeros(0 if rule is None else len(rule.buckets), np.int64)
    for number in range(len(shards.indices)):
        index = shards.index(number)
        w, h = index.width.astype(np.int64) * factor, index.height.astype(np.int64) * factor
        for counter, values in ((width, w), (height, h), (shorter, np.minimum(w, h))):
            _count(counter, values)
        ratios += np.bincount(_nearest_ratio(w, h), minlength=len(_RATIOS))
        if rule is not None and len(index):
            buckets += np.bincount(rule.assign(w, h), minlength=len(buckets))
        for name, lengths in zip(names, index.caption_length.T, strict=False):
            _count(captions[name], lengths)
        for extension in index.extensions:
            sizes = index.lengths(extension)
            known = members.setdefault(extension, [0, 0])
            members[extension] = [known[0] + len(sizes), known[1] + int(sizes.sum(dtype=np.int64))]
    facts: dict[str, Any] = {
        "members": {
            name: {"samples": count, "mean_bytes": total / count} for name, (count, total) in members.items() if count
        },
        "width": _summary(width),
        "height": _summary(height),
        "shorter_side": _doubling(shorter),
        "aspect_ratios": [[name, count] for name, count in zip(_RATIOS, ratios.tolist(), strict=True)],
        "caption_unit": "characters" if not {"safetensors", *mlperf.EXTENSIONS} & set(members) else "tokens",
        "captions": {name: _captions(counter, len(shards)) for name, counter in captions.items()},
    }
    if rule is not None:
        facts["buckets"] = [[*side, count] for side, count in zip(rule.buckets, buckets.tolist(), strict=True)]
    return facts


def _count(counter: Counter[int], values: np.ndarray) -> None:
    found, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _nearest_ratio(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    ratios = np.log([int(w) / int(h) for w, h in (name.split(":") for name in _RATIOS)])
    return np.searchsorted((ratios[1:] + ratios[:-1]) / 2, np.log(width / height))


def _summary(counter: Counter[int]) -> dict[str, Any]:
    """Smallest, median (the lower of two), mean and largest of counted values; empty if there is none."""
    if not counter:
        return {}
    mean = sum(value * count for value, count in counter.items()) / counter.total()
    return {"min": min(counter), "median": _quantile(counter, 0.5), "mean": mean, "max": max(counter)}


def _quantile(counter: Counter[int], share: float) -> int:
    """The smallest value that at least this share of the counted ones do not exceed."""
    left = math.ceil(share * counter.total())
    for value, count in sorted(counter.items()):
        left -= count
        if left <= 0:
            return value
    raise AssertionError(counter)


def _captions(counter: Counter[int], samples: int) -> dict[str, Any]:
    """Of the lengths of one caption, −1 where it is absent; a shard without it counts none at all."""
    present = Counter({length: count for length, count in counter.items() if length >= 0})
    facts = {"samples": present.total(), "absent": samples - present.total(), **_summary(present)}
    return {**facts, "histogram": _even(present)}


def _even(counter: Counter[int]) -> list[list[int | None]]:
    """[first value, last value, samples] of bins of equal width 1, 2 or 5·10ⁿ; what lies beyond 99 % of the samples is
    in one last bin without an end, so that a few long captions don't flatten the others."""
    if not counter:
        return []
    low, high = min(counter), _quantile(counter, 0.99)
    step = next(
        step for power in range(12) for step in (10**power, 2 * 10**power, 5 * 10**power)
        if high // step - low // step < _BINS
    )  # fmt: skip
    bins: list[list[int | None]] = []
    for start in range(low // step * step, high + 1, step):
        bins.append([start, start + step - 1, sum(counter[value] for value in range(start, start + step))])
    end = high // step * step + step
    beyond = sum(count for value, count in counter.items() if value >= end)
    return [*bins, [end, None, beyond]] if beyond else bins


def _doubling(counter: Counter[int]) -> list[list[int | None]]:
    """[first value, last value, samples] of bins from one power of two to the next."""
    bins = Counter[int]()
    for value, count in counter.items():
        bins[value.bit_length()] += count
    lengths = range(min(bins), max(bins) + 1) if bins else range(0)
    return [[2 ** (length - 1), 2**length - 1, bins[length]] for length in lengths]


def _manifest(manifest: Manifest) -> dict[str, Any]:
    text = ("pad", "t5_max_tokens", "clip_tokens", "clip_projection", "dtype", "t5_dtype", "captions")
    latent = ("scale", "shift", "latent_channels", "latent_factor", "latent_mean", "latent_std", "samples", "rejected")
    return {
        "source": manifest.source[:_SHOWN_DIGITS],
        "encoders": {name: digest[:_SHOWN_DIGITS] for name, digest in manifest.encoders.items()},
        **{name: getattr(manifest, name) for name in (*text, *latent)},
        "cut": {name: cut.model_dump() for name, cut in manifest.cut.items()},
    }


# ---- as text


def render(facts: dict[str, Any]) -> str:
    """The facts of `describe` for people."""
    encoded = "manifest" in facts
    mean = facts["bytes_per_sample"]
    lines = [
        f"{facts['source']}: {facts['samples']:,} {'pre-encoded' if encoded else 'raw'} samples in "
        f"{facts['shards']:,} shards, {_bytes(facts['bytes'])}, {_bytes(mean)} a sample",
        f"samples a shard: {_line(facts['samples_per_shard'])}",
    ]
    for extension, member in facts["members"].items():
        lines.append(f".{extension}: {member['samples']:,} samples, {_bytes(member['mean_bytes'])} each in the mean")
    lines += [f"left out: {count:,} × {kind}" for kind, count in facts["rejected"].items()]
    lines += [f"caption not usable: {count:,} × {kind}" for kind, count in facts["bad_captions"].items()]
    lines += [f"{name}: damaged archive: {damage}" for name, damage in facts["damaged"].items()]
    if facts["strays"]:
        lines.append(f"not read: files of no sample: {facts['strays']:,}")
    lines += [f"not read: {count:,} × .{other} beside .{read}" for read, other, count in facts["further_images"]]
    if encoded:
        lines += ["", *_manifest_lines(facts["manifest"])]
    elif facts["width"]:
        lines += ["", f"width: {_line(facts['width'])} pixels", f"height: {_line(facts['height'])} pixels"]
        lines += ["shorter side:", *_bars([(_range(*bin[:2]), bin[2]) for bin in facts["shorter_side"]])]
        lines += ["width : height, the nearest of these:", *_bars(facts["aspect_ratios"])]
    counts = [count for *_, count in facts.get("buckets", [])]
    if any(counts):
        rule = BucketRule(buckets=tuple((width, height) for width, height, _ in facts["buckets"]))
        lines += ["", "buckets:", histogram(counts, rule)]
    for name, caption in facts["captions"].items():
        absent = f", {caption['absent']:,} samples without" if caption["absent"] else ""
        told = f"{_line(caption)} {facts['caption_unit']}{absent}" if caption["samples"] else "none"
        lines += ["", f"caption {name}: {told}", *_bars([(_range(*bin[:2]), bin[2]) for bin in caption["histogram"]])]
    return "\n".join(lines)


def _manifest_lines(facts: dict[str, Any]) -> list[str]:
    encoders = ", ".join(f"{name} {digest}" for name, digest in facts["encoders"].items())
    t5_dtype = f", T5 in {facts['t5_dtype']}" if facts["t5_dtype"] else ""
    clip = "with" if facts["clip_tokens"] else "without"
    pooled = "projected" if facts["clip_projection"] else "not projected"
    latent = f"{facts['latent_channels']} channels at 1/{facts['latent_factor']} of the side"
    return [
        f"encoders: {encoders}",
        f"source: {facts['source']}",
        f"stored in {facts['dtype']}{t5_dtype}; captions: {', '.join(facts['captions'])}; {facts['samples']:,} samples "
        f"of the manifest, {facts['rejected']:,} left out",
        f"text: pad {facts['pad']}, at most {facts['t5_max_tokens']} tokens of T5, {clip} CLIP's tokens; pooled vector "
        f"{pooled}",
        *cuts.lines({name: Cut(**cut) for name, cut in facts["cut"].items()}),
        f"latent: {latent}, scale {facts['scale']:.6g}, shift {facts['shift']:.6g}",
        f"  mean a channel: {' '.join(f'{value:.3g}' for value in facts['latent_mean'])}",
        f"  standard deviation: {' '.join(f'{value:.3g}' for value in facts['latent_std'])}",
    ]


def _line(summary: dict[str, Any]) -> str:
    return f"{summary['min']:,} – {summary['median']:,} – {summary['max']:,} (smallest, median, largest)"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def _range(first: int, last: int | None) -> str:
    return f"{first:,} or more" if last is None else f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _bars(rows: Sequence[Sequence[Any]]) -> list[str]:
    """A line for each (label, count), from the first to the last that has samples."""
    filled = [at for at, (_, count) in enumerate(rows) if count]
    if not filled:
        return []
    rows = rows[filled[0] : filled[-1] + 1]
    most, total = max(count for _, count in rows), sum(count for _, count in rows)
    widths = max(len(label) for label, _ in rows), len(f"{most:,}")
    return [
        f"  {label:>{widths[0]}}  {count:>{widths[1]},}  {100 * count / total:5.1f} %  "
        f"{'█' * (max(1, round(_BAR * count / most)) if count else 0)}".rstrip()
        for label, count in rows
    ]
