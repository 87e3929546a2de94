"""Whether pre-encoded samples are what their configuration makes of the source: encode some again, and compare."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stack import dist
from stack.config import UserError
from stack.data.remote import ShardCache
from stack.data.safety import Rejected
from stack.data.schema import DTYPES, load_manifest, sample_to_bytes
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.log import progress
from stack.preencode.job import PreencodeConfig, encoder_fingerprints, mark_of
from stack.preencode.pipeline import Encoders, Item, Outcome, read_samples
from stack.preencode.stats import read_all, stats_path

_TOKENS = ("t5", "clip_l", "clip_g")  # of which each row is one token

# What two encodings of one sample may differ by. Both are computed in floating point, then stored with few bits:
#
# - Storing. Numbers that differ by next to nothing may be rounded to two neighbours, however near they are. Neighbours
#   are 2⁻⁷ of their size apart in bfloat16 (8 significant bits, the leading one is not stored) and 2⁻²³ in float32. In
#   float8 e4m3 (4 bits) they are 2⁻³ apart, and below 2⁻⁶, times the token's scale, 2⁻⁹.
# - Computing. A sample stands in another batch than before, so kernels add in another order, and how much a sum differs
#   goes by the size of its terms: by the root mean square of the token or latent, not by the value itself. In float32
#   (24 bits) a T5 of 24 layers, a caption alone and in a batch of 16, differs by 5·10⁻⁶ of that at most, in bfloat16
#   (a hundred roundings of 2⁻⁹ on the way) by .022 in the mean and .125 at most, and as much from float32. Allowed are
#   2⁻¹² and 2⁻². Another caption, another crop or other weights make a difference of the size of the values themselves.
_SPACING = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float8_e4m3fn: 2.0**-3}
_FLOAT8_SUBNORMAL = 2.0**-9
_NOISE = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-2}


@dataclass
class Agreement:
    """How one tensor, stored and encoded again, agrees over all samples; float8 is scaled back before it is compared.

    equal: values that are stored with the same bits.  largest: absolute difference.  cosine: the lowest one, of a token
    of t5, clip_l or clip_g, else of the whole tensor.
    """

    values: int = 0
    equal: int = 0
    largest: float = 0.0
    cosine: float = 1.0


@dataclass
class Verified:
    """failures: SHARD: KEY: what is wrong, of samples that differ by more than rounding explains."""

    samples: int
    tensors: dict[str, Agreement] = field(default_factory=lambda: defaultdict(Agreement))
    failures: list[str] = field(default_factory=list)


def verify(config: PreencodeConfig, count: int) -> Verified:
    """Encode `count` samples, spread evenly over the finished data set, again from the source.

    Raises UserError where the set is not finished, or is not this configuration's.
    """
    manifest = load_manifest(config.out)
    fingerprints = encoder_fingerprints(config)
    manifest.check(str(config.out), fingerprints, config.text)
    cache = ShardCache(config.cache)
    source = ShardSet(index_shards(config.source, config.index, cache))
    stored = ShardSet(index_shards(config.out))
    manifest.check_shards(str(config.out), {index.name: (len(index), index.sha256) for index in stored.indices})
    noise = max(
        _NOISE[compute]
        for compute in (_computed_in(config, source, fingerprints, manifest.reading), dist.frozen_dtype(dist.device()))
    )
    count = min(count, stored.num_samples)
    chosen = [(2 * at + 1) * stored.num_samples // (2 * count) for at in range(count)]
    encoders, reader, result = Encoders(config), ShardReader(stored.indices), Verified(count)
    items = _encode_again(config, encoders, source, ShardReader(source.indices, cache), stored, chosen)
    with progress("verify", count, "sample") as advance:
        for shard, row, outcome in items:
            index = stored.indices[shard]
            members = {extension: reader.read(shard, row, extension) for extension in ("safetensors", "json")}
            failure = _compare(config, members, outcome, noise, result.tensors)
            if failure:
                result.failures.append(f"{index.name}: {index.key(row)}: {failure}")
            advance(1, f"{len(result.failures):,} differ")
    return result


def _computed_in(config: PreencodeConfig, source: ShardSet, fingerprints: dict[str, str], reading: int) -> torch.dtype:
    """What the encoders calculated in when the shards were written. Raises UserError for another configuration's."""
    marks = {mark_of(config, source, fingerprints, compute, reading): compute for compute in _NOISE}
    stats = read_all([stats_path(config.out / index.name) for index in source.indices])
    found = {str(one and one.get("mark")) for one in stats}
    if len(found) > 1 or not found <= set(marks):
        raise UserError(
            f"{config.out}: its shards were made from other sources or settings than this configuration names: "
            "give the one that made them"
        )
    return marks[found.pop()]


def _encode_again(
    config: PreencodeConfig,
    encoders: Encoders,
    source: ShardSet,
    reader: ShardReader,
    stored: ShardSet,
    chosen: list[int],
) -> Iterator[tuple[int, int, Outcome]]:
    """(shard, row, what becomes of the source's sample now) of each stored sample."""
    shards = {index.name: number for number, index in enumerate(source.indices)}
    places: dict[int, list[int]] = defaultdict(list)
    for sample in chosen:
        shard, row = stored.locate(sample)
        places[shard].append(row)

    def items() -> Iterator[tuple[int, int, Item]]:
        for shard, rows in places.items():
            index = stored.index(shard)
            number = shards[index.name]
            by_key = {key: row for row, key in enumerate(source.index(number).keys)}
            if lost := [index.key(row) for row in rows if index.key(row) not in by_key]:
                raise UserError(f"{index.url}: sample {lost[0]!r} is not in the source; see `mmdit data lint`")
            again = read_samples(config, encoders.rule, reader, number, [by_key[index.key(row)] for row in rows])
            yield from ((shard, row, item) for row, item in zip(rows, again, strict=True))

    waiting = items()
    while chunk := list(islice(waiting, config.batch_size)):
        outcomes = encoders.encode([item for _, _, item in chunk])
        yield from ((shard, row, outcome) for (shard, row, _), outcome in zip(chunk, outcomes, strict=True))


def _compare(
    config: PreencodeConfig,
    members: dict[str, bytes],
    outcome: Outcome,
    noise: float,
    tensors: dict[str, Agreement],
) -> str:
    """Counts one sample in `tensors`; why it differs by more than rounding explains, or ""."""
    if isinstance(outcome, Rejected):
        return f"stored, but cannot be encoded now: {outcome.reason}"
    item, sample = outcome
    try:
        stored = load(members["safetensors"])
        facts = json.loads(members["json"])
    except (SafetensorError, ValueError) as error:
        return f"not readable: {' '.join(str(error).split())}"
    again = load(sample_to_bytes(sample, DTYPES[config.dtype], config.t5_dtype))
    failures = [f"JSON has {facts!r}, again {item.facts!r}"] if facts != item.facts else []
    if set(stored) != set(again):
        failures.append(f"tensors {', '.join(sorted(stored))}, again {', '.join(sorted(again))}")
    for name in sorted(set(stored) & set(again)):
        one, other = stored[name], again[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            failures.append(f"{name} is {one.dtype} {list(one.shape)}, again {other.dtype} {list(other.shape)}")
            continue
        scale = _scale(name) if one.dtype == torch.float8_e4m3fn else ""
        if one.numel():
            failure = _agree(name, (one, stored.get(scale)), (other, again.get(scale)), noise, tensors[name])
            failures += [f"{name} {failure}"] if failure else []
    return "; ".join(failures)


def _scale(name: str) -> str:
    return name.replace("t5", "t5_scale", 1)


def _agree(
    name: str, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None], noise: float, found: Agreement
) -> str:
    """Counts a tensor in `found`, given with its scale both times; how it differs beyond rounding, or ""."""
    (a, _), (b, scale_L) = rows = [_rows(name, *each) for each in (one, other)]
    spacing = _SPACING[one[0].dtype] * torch.maximum(a.abs(), b.abs())
    if scale_L is not None:
        spacing = torch.maximum(spacing, _FLOAT8_SUBNORMAL * scale_L)
    size = torch.stack([values.square().mean(-1, keepdim=True).sqrt() for values, _ in rows]).amax(0)
    allowed, difference = spacing + noise * size, (a - b).abs()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30)
    found.values += a.numel()
    found.equal += int((one[0].float() == other[0].float()).sum())
    found.largest = max(found.largest, float(difference.nan_to_num(torch.inf).max()))
    found.cosine = min(found.cosine, float(torch.where((a == b).all(-1), 1.0, cosine).nan_to_num(-1.0).min()))
    broken = [int((~values.isfinite()).sum()) for values, _ in rows]
    if any(broken):
        return f"has {broken[0]:,} non-finite values, again {broken[1]:,}"
    beyond = difference > allowed
    if not beyond.any():
        return ""
    at = (difference - allowed).argmax()
    told = f"{difference.flatten()[at]:.3g} where rounding explains {allowed.flatten()[at]:.3g}"
    return f"differs by {told}, in {int(beyond.sum()):,} of {a.numel():,} values"


def _rows(name: str, values: Tensor, scale_L: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(float64 [tokens, channels], or [1, values] of what is no text; the scale [tokens, 1])."""
    if scale_L is not None:
        return values.double() * scale_L.double()[:, None], scale_L[:, None]
    return (values if name.partition(".")[0] in _TOKENS else values.flatten()[None]).double(), None
