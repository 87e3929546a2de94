"""Exponential moving average of the weights, on each rank's own fp32 partitions, at every ZeRO stage.

No gather until a snapshot is written: a step costs one pass over the rank's share.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stack.config import Config
from stack.parallel.engine import Engine, Partition, gather


class EmaConfig(Config):
    decay: float = Field(default=0.9999, ge=0, lt=1)
    """The average's decay a step; early on min(decay, (1+n)/(10+n)) after n steps, so that the start is forgotten."""


class Ema:
    """The shadow of every partition that this rank owns."""

    def __init__(self, engine: Engine, config: EmaConfig):
        self._engine = engine
        self._decay = config.decay
        self.pairs: list[tuple[Partition, Tensor]] = [(p, p.master.clone()) for p in engine.partitions if p.owned]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1): shadow ← decay·shadow + (1 − decay)·weights."""
        if self.pairs:
            weight = 1 - min(self._decay, (1 + step) / (10 + step))
            shadows, masters = [s for _, s in self.pairs], [p.master for p, _ in self.pairs]
            torch._foreach_lerp_(shadows, masters, weight)

    def gathered(self) -> dict[str, Tensor] | None:
        """The whole averaged parameters on rank 0's CPU, None elsewhere. A collective."""
        return gather(self._engine, self.pairs)
