"""Two contenders measured side by side, and the row that says what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from peers import Pass

Number = float | int | str | None


@dataclass(frozen=True)
class Row:
    """`ratio`: how many times better ours is (a share where the name says so), from the medians.

    `peer` says "not installed" or "failed" and `ratio` is None where there is nothing to compare with.
    """

    name: str
    ours: Number
    peer: Number
    ratio: float | None
    target: float | None
    unit: str
    pairs: int
    remark: str = ""

    def json(self) -> str:
        names = ("name", "ours", "peer", "ratio", "target", "unit", "pairs")
        return json.dumps({name: getattr(self, name) for name in names})

    def text(self) -> str:
        ours, peer, ratio, target = (_figure(value) for value in (self.ours, self.peer, self.ratio, self.target))
        return _line(self.name, ours, peer, ratio, target, self.unit, str(self.pairs), self.remark)


def _line(name: str, ours: str, peer: str, ratio: str, target: str, unit: str, pairs: str, remark: str) -> str:
    line = f"{name:46} {ours:>10} {peer:>13} {ratio:>7} {target:>7}  {unit:13} {pairs:>5}  {remark}"
    return line.rstrip()


HEADER = _line("", "ours", "peer", "ratio", "target", "unit", "pairs", "")


def _figure(value: Number) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def side_by_side(
    name: str,
    ours: Callable[[], Pass],
    peer: Callable[[], Pass],
    work: float,
    unit: str,
    target: float | None,
    pairs: int,
) -> Row:
    """Ours, peer, ours, peer, … after one pass each to warm up. A pass does `work`: samples, for samples/s."""
    ours(), peer()
    both = [(ours(), peer()) for _ in range(pairs)]
    our_seconds, peer_seconds = ([one.seconds for one in side] for side in zip(*both, strict=True))
    processor = [sum(one.processor for one in side) / pairs for side in zip(*both, strict=True)]
    best = min(peer_seconds) / min(our_seconds)
    remark = f"minimum {best:.3g}; processor {processor[0]:.2f} s : {processor[1]:.2f} s a pass"
    print(f"{name}: {median(our_seconds):.3f} s : {median(peer_seconds):.3f} s", file=sys.stderr)
    ratio = median(peer_seconds) / median(our_seconds)
    return Row(name, work / median(our_seconds), work / median(peer_seconds), ratio, target, unit, pairs, remark)
