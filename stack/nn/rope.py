"""Rotary position embedding over several axes (RoFormer, arXiv 2104.09864; the axial form as in FLUX).

B batch · A heads · S tokens · E head size · K axes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 10_000.0


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, [S, E/2] or [B, S, E/2]."""

    cos: Tensor
    sin: Tensor

    def to(self, dtype: torch.dtype) -> Rotation:
        return Rotation(self.cos.to(dtype), self.sin.to(dtype))


def grid_ids(height: int, width: int, num_axes: int, device: torch.device | None = None) -> Tensor:
    """Ids [height·width, K] of image tokens, row by row: zeros, then row and column. Float64.

    A text token's ids are all 0, so it is not turned.
    """
    rows = torch.arange(height, dtype=torch.float64, device=device)
    columns = torch.arange(width, dtype=torch.float64, device=device)
    return F.pad(torch.cartesian_prod(rows, columns), (num_axes - 2, 0))


def rotation(ids_SK: Tensor, axes: Sequence[int], theta: float = THETA) -> Rotation:
    """Angles id·theta^(−2i/axis) for each axis, `axes` channels of the head each; computed and returned in float64.

    Raises ValueError unless there are as many axes as ids and each has an even number of channels.
    """
    if len(axes) != ids_SK.shape[-1] or any(axis % 2 for axis in axes):
        raise ValueError(f"{ids_SK.shape[-1]} ids a token need as many axes of even size, got {tuple(axes)}")
    angle = torch.cat(
        [
            ids_SK[:, k, None].double()
            * theta ** -(torch.arange(0, axis, 2, dtype=torch.float64, device=ids_SK.device) / axis)
            for k, axis in enumerate(axes)
        ],
        dim=-1,
    )
    return Rotation(angle.cos(), angle.sin())


def rotate(x_BSAE: Tensor, by: Rotation) -> Tensor:
    """Turn the channel pairs (2i, 2i+1) of each token by its angles; computed in float32 or wider."""
    wide = torch.promote_types(x_BSAE.dtype, torch.float32)
    if 2 * by.cos.shape[-1] != x_BSAE.shape[-1]:
        raise ValueError(f"rotary axes of {2 * by.cos.shape[-1]} channels in all, but heads of {x_BSAE.shape[-1]}")
    turn = torch.complex(*(table.to(wide) for table in by)).unsqueeze(-2)  # strided halves would take ten times as long
    pairs = torch.view_as_complex(x_BSAE.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BSAE.dtype)
