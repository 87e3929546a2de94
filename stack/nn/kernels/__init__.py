"""What a transformer block does between its matrix products, each fused into one pass over the tokens.

Each function has a plain form, which says what it computes, and a Triton form with a backward pass of its own, in
fused.py.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def runs_fused(x: Tensor) -> bool:
    """Whether the Triton form computes with `x`: on a GPU, in eager mode. torch.compile fuses the plain form itself."""
    return not torch.compiler.is_compiling() and x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
