"""Random numbers that belong to a sample's place in training and to nothing else.

The draws of global position p in step n are a function of (seed, n, p, stream): no rank, world size, batch or restart
enters, and no generator's state has to be saved. Philox (Salmon et al., SC 2011) makes that cheap: the key comes from
seed and stream, the counter starts at (step, position).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class NoisePlan:
    """All randomness of a run with `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def at(self, step: int, positions: Sequence[int]) -> Draws:
        """The draws of the samples at the global `positions` of `step`."""
        return Draws(self.seed, step, positions)


class Draws:
    """Values for some samples of one step, by Philox (SC 2011): key hash(seed, stream), counter (step, position). A
    stream gives the same values whenever it is asked for. One row a sample: [len(positions), …]."""

    def __init__(self, seed: int, step: int, positions: Sequence[int]) -> None:
        self.seed = seed
        self.step = step
        self.positions = positions

    def of_step(self) -> Draws:
        """One row of values, the same for all samples of the step."""
        return Draws(self.seed, self.step, [0])

    def normal(self, stream: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal [len(positions), *shape], drawn in float32 (float64 for that `dtype`)."""
        drawn = np.float64 if dtype == torch.float64 else np.float32
        return self._fill(stream, shape, drawn, lambda g, out: g.standard_normal(dtype=out.dtype, out=out)).to(dtype)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform float32 [len(positions), *shape] in the open interval (0, 1): odd multiples of 2⁻²⁴."""

        def fill(generator: np.random.Generator, out: np.ndarray) -> None:
            raw = generator.bit_generator.random_raw(out.size) >> np.uint64(64 - 23)
            out[...] = (raw.reshape(out.shape) + 0.5) / (1 << 23)

        return self._fill(stream, shape, np.float32, fill)

    def _fill(
        self,
        stream: str,
        shape: Sequence[int],
        dtype: type[np.floating],
        fill: Callable[[np.random.Generator, np.ndarray], object],
    ) -> Tensor:
        key = np.frombuffer(hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=16).digest(), np.uint64)
        values = np.empty((len(self.positions), *shape), dtype)
        for row, position in enumerate(self.positions):
            # The two low words count within the sample, so no two samples' numbers can overlap.
            counter = np.array([0, 0, position, self.step], np.uint64)
            fill(np.random.Generator(np.random.Philox(counter=counter, key=key)), values[row : row + 1])
        return torch.from_numpy(values)
