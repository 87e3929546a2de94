"""Attention behind one function, which every model calls, and the implementations that it chooses among.

B batch · A heads · S tokens · E head size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stack.config import UserError
from stack.log import say
from stack.nn.layout import Layout, Packing

Backend = Literal["auto", "sdpa", "varlen", "flex", "xformers", "reference"]


def attend(q_BSAE: Tensor, k_BSAE: Tensor, v_BSAE: Tensor, layout: Layout) -> Tensor:
    """softmax(q kᵀ / √E) v for each head, among the tokens of each sample. Returns the shape of `q_BSAE`.

    [B, S, A, E] where every sample has S tokens, [1, S, A, E] where samples stand in one row. `layout` says which,
    and which backend computes it: a name that `choose` returned.
    """
    backend = _BACKENDS[layout.backend]
    if layout.packing is None:
        return backend.batch(q_BSAE, k_BSAE, v_BSAE)
    return backend.row(q_BSAE, k_BSAE, v_BSAE, layout.packing)


@cache
def choose(wanted: Backend, device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> str:
    """The backend for these tensors: `wanted`, or the fastest that runs for "auto", which says so once.

    backward: whether gradients are wanted.

    Raises UserError, with the reason, where `wanted` cannot compute them.
    """

    def refusal(name: str) -> str | None:
        return _BACKENDS[name].refuses(device, dtype, head_size, backward)

    if wanted != "auto":
        if reason := refusal(wanted):
            raise UserError(f"compute.attention={wanted}: {reason}")
        return wanted
    chosen = next(name for name in ("varlen", "sdpa") if refusal(name) is None)
    _tell(chosen, device.type, dtype)
    return chosen


@cache
def _tell(chosen: str, device_type: str, dtype: torch.dtype) -> None:
    say(f"attention: {chosen} on {device_type} in {str(dtype).removeprefix('torch.')}")


class _Backend(NamedTuple):
    batch: Callable[[Tensor, Tensor, Tensor], Tensor]
    row: Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
    refuses: Callable[[torch.device, torch.dtype, int, bool], str | None]
    """Why it can't compute on a device, in a dtype, with heads of a size, backward too; None where it can."""


AMPERE = (8, 0)
"""The compute capability from which on GPUs have bfloat16, and flash attention runs."""


def _never(device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> None:
    return None


def _sdpa(q_BSAE: Tensor, k_BSAE: Tensor, v_BSAE: Tensor, mask_B11S: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSAE, k_BSAE, v_BSAE))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11S).transpose(1, 2)


def _sdpa_row(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Padded to the longest sample, with a mask."""
    batch, longest = len(packing.offsets) - 1, packing.longest
    positions = torch.arange(longest, device=q.device)
    real_BS = positions < packing.offsets.diff()[:, None]
    place_S = real_BS.flatten().nonzero_static(size=q.shape[1])[:, 0]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * longest, *x.shape[2:])
        return padded.index_copy(0, place_S, x[0]).unflatten(0, (batch, longest))

    return _sdpa(pad(q), pad(k), pad(v), real_BS[:, None, None]).flatten(0, 1).index_select(0, place_S)[None]


def _row_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(1, q.shape[2], q.shape[1], dtype=wide)


@torch.library.custom_op("mmdit::attend_samples", mutates_args=(), device_types="cpu")
def attend_samples(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a row [1, S, A, E] sample by sample, which a CPU does as fast as all at once.

    Returns what `attend` does, and the logarithm of each softmax's sum [1, A, S]. An operator of its own, so that
    a compiled model does not depend on the lengths.
    """
    attended, logsumexp = _row_outputs(q)
    for start, stop in pairwise(starts.tolist()):
        sample = (x[:, start:stop].transpose(1, 2) for x in (q, k, v))
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*sample)
        attended[:, start:stop] = out.transpose(1, 2)
        logsumexp[..., start:stop] = sums
    return attended, logsumexp


@torch.library.custom_op("mmdit::attend_samples_backward", mutates_args=(), device_types="cpu")
def attend_samples_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, logsumexp: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    for start, stop in pairwise(starts.tolist()):
        sample = (x[:, start:stop].transpose(1, 2) for x in (grad, q, k, v, attended))
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *sample, logsumexp[..., start:stop], 0.0, False
        )
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient[:, start:stop] = piece.transpose(1, 2)
    return gradients[0], gradients[1], gradients[2]


@attend_samples.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return _row_outputs(q)


@attend_samples_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_samples_backward(grad, *ctx.saved_tensors), None


attend_samples.register_autograd(_backward, setup_context=_keep)


def _varlen_row(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if q.device.type == "cpu":
        return attend_samples(q, k, v, packing.starts)[0]
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = packing.offsets, packing.longest
    attended = varlen_attn(q[0], k[0], v[0], offsets, offsets, longest, longest)
    assert isinstance(attended, Tensor)
    return attended[None]


def _varlen_refuses(device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16 on a GPU, got {dtype} on {device.type}"
    if head_size % 8 or head_size > 256:
        return f"needs heads of a multiple of 8 up to 256, got {head_size}"
    return _too_old(device)


def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= AMPERE else f"needs compute capability 8.0, this GPU has {major}.{minor}"


@cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _flex(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if packing is None else packing.block_mask
    return _flex_attention(q.device.type)(q, k, v, block_mask=mask).transpose(1, 2)


def _flex_refuses(device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> str | None:
    if device.type != "cuda" and backward:
        return f"has no backward pass on {device.type}"
    if device.type == "cuda" and head_size < 16:
        return f"needs heads of 16 or more on a GPU, got {head_size}"
    return None


def _xformers(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, attn_bias=None if packing is None else xformers_mask(packing))


def xformers_mask(packing: Packing) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(packing.starts.diff().tolist())


def _xformers_refuses(device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> str | None:
    if device.type != "cuda":
        return f"needs a GPU, got {device.type}"
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return f"xformers cannot be imported ({error})"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"needs bfloat16, float16 or float32, got {dtype}"
    multiple = 16 // dtype.itemsize  # rows are read 16 bytes at a time
    if head_size % multiple:
        return f"needs heads of a multiple of {multiple} in {dtype}, got {head_size}"
    return _too_old(device) if dtype == torch.bfloat16 else None


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula itself, in float64."""
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ wide[2]).transpose(1, 2).to(q.dtype)


def _reference_row(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    lengths = packing.starts.diff().tolist()
    samples = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_reference(*sample) for sample in samples], 1)


_BACKENDS = {
    "sdpa": _Backend(_sdpa, _sdpa_row, _never),
    "varlen": _Backend(_sdpa, _varlen_row, _varlen_refuses),
    "flex": _Backend(_flex, _flex, _flex_refuses),
    "xformers": _Backend(_xformers, _xformers, _xformers_refuses),
    "reference": _Backend(_reference, _reference_row, _never),
}
