"""Adaptive LayerNorm (DiT, arXiv 2212.09748, §3.2): a vector per sample scales, shifts and gates its tokens.

B batch · N tokens · D width; a vector is [B, 1, D], or [B, N, D] where tokens have their own
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stack.nn.linear import Linear


class ShiftScaleGate(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(Linear):
    """SiLU(vec) → `num_vectors` vectors side by side, [B, D] → [B, num_vectors·D]. The SiLU is the caller's, once."""

    def __init__(self, width: int, num_vectors: int) -> None:
        super().__init__(width, num_vectors * width)


def triples(vectors: Tensor, width: int) -> list[ShiftScaleGate]:
    """[…, 3·n·D] → n times shift, scale and gate."""
    return [ShiftScaleGate(*triple.chunk(3, dim=-1)) for triple in vectors.split(3 * width, dim=-1)]
