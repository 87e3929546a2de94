"""From numbers, pixels and grid positions to vectors.

B batch · C channels · H W height, width · N image tokens · D width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stack.nn.linear import Linear

TIMESTEP_SCALE = 1000.0
MAX_PERIOD = 10_000


def timestep_embedding(t_B: Tensor, size: int = 256) -> Tensor:
    """cos ‖ sin of 1000·t at `size`/2 geometric frequencies from 1 to 1/10000 radian; t in 0…1. Float32 [B, size].

    The frequencies are computed in float32, in SD3's order of operations: at 1000 radians another rounding of them
    moves the result by 1e-4, and published weights were trained on these.
    """
    half = size // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angle = (TIMESTEP_SCALE * t_B.float())[:, None] * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedder(nn.Module):
    """Linear, SiLU, linear: how a timestep's sinusoids or a pooled text vector become a modulation vector."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(in_features, width)
        self.outer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x)))


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, N, C·patch²], row by row; a token holds its patch as (c, p, q), SD3's order."""
    return rearrange(x_BCHW, "B C (h p) (w q) -> B (h w) (C p q)", p=patch, q=patch)


def unpatchify(x_BND: Tensor, height: int, width: int, patch: int) -> Tensor:
    """[B, N, patch²·C] → [B, C, height·patch, width·patch]; a token holds its patch as (p, q, c), SD3's order."""
    return rearrange(x_BND, "B (h w) (p q C) -> B C (h p) (w q)", h=height, w=width, p=patch, q=patch)


def table_coordinates(
    length: int, table_size: int, base_size: float, origin: float = 0.0, device: torch.device | None = None
) -> Tensor:
    """Coordinates along one side of an image of `length` patches: the centre crop of a table of `table_size` patches.

    Patch p of the table lies at origin + p·base_size/table_size. SD3-medium: 192 patches, base size 64, origin 0.
    SD3 §5.3.2, for S² pixels and s patches a side: origin (s − table_size)/2·256/S, base size table_size·256/S.
    Float64 [length], rounded to float32 as in the published tables. Raises ValueError when the image is larger than
    the table.
    """
    if length > table_size:
        raise ValueError(f"an image of {length} patches a side does not fit a position table of {table_size}")
    first = (table_size - length) // 2
    patches = torch.arange(first, first + length, dtype=torch.float32, device=device)
    return origin + (patches / (table_size / base_size)).double()


def sincos_positions(rows_H: Tensor, columns_W: Tensor, width: int) -> Tensor:
    """Two-dimensional sin-cos position vectors [H·W, width]: computed in float64, rounded to float32 as the published
    tables are.

    A half for the column and a half for the row, each sin ‖ cos of its coordinate at width/4 frequencies.
    """
    frequency = 1 / MAX_PERIOD ** (torch.arange(width // 4, dtype=torch.float64, device=rows_H.device) / (width // 4))
    row_HD, column_WD = (
        torch.cat([angle.sin(), angle.cos()], dim=-1)
        for angle in (rows_H[:, None] * frequency, columns_W[:, None] * frequency)
    )
    size = (len(rows_H), len(columns_W), width // 2)
    return torch.cat([column_WD[None].expand(size), row_HD[:, None].expand(size)], dim=-1).flatten(0, 1).float()
