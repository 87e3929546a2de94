"""Captions that are longer than an encoder reads: how many there are, and the longest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from stack.config import Config
from stack.shown import printable
from stack.text.conditioning import EncodedText


class Cut(Config):
    """Captions of which one encoder read only the beginning."""

    captions: int
    limit: int
    """Tokens that the encoder reads."""
    tokens: int
    """Tokens of the longest caption."""
    longest: str
    """Where it is: its sample's key; in a manifest SHARD: KEY."""


def add_sample(cuts: dict[str, Cut], key: str, texts: Sequence[EncodedText | None], limits: Mapping[str, int]) -> None:
    """Count the captions of a sample in `cuts`, which has one entry per encoder."""
    for text in texts:
        for name, tokens in ({} if text is None else text.cut).items():
            add(cuts, {name: Cut(captions=1, limit=limits[name], tokens=tokens, longest=printable(key))})


def add(cuts: dict[str, Cut], more: Mapping[str, Cut], shard: str = "") -> None:
    """Take `more` into `cuts`; `shard` is put before the keys. Of equally long captions the first is kept."""
    for name, cut in more.items():
        longest = cut.model_copy(update={"longest": f"{shard}: {cut.longest}"}) if shard else cut
        known = cuts.get(name)
        if known is not None and known.tokens >= cut.tokens:
            longest = known
        count = cut.captions + (0 if known is None else known.captions)
        cuts[name] = longest.model_copy(update={"captions": count})


def lines(cuts: Mapping[str, Cut]) -> list[str]:
    """For people; encoders that cut the same captions share a line."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, cut in cuts.items():
        told = f"read {cut.limit} tokens; the longest has {cut.tokens:,}: {cut.longest}"
        alike[f"{cut.captions:,} captions were cut: {{}} {told}"].append(name)
    return [line.replace("{}", " and ".join(names), 1) for line, names in alike.items()]
