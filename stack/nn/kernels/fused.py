"""The Triton forms of this folder's functions, forward and backward. Imported where one runs, for Triton may be absent.

A program computes one token: all its channels, in `BLOCK` lanes, the next power of two. In a backward pass it takes
several tokens that share their vectors, one after another, and stores the sum of what they add to a gradient; PyTorch
adds up these sums. So no two programs write to one place, and a gradient is the same each time. Numbers are WIDE while
they are computed with, float32 or float64, and rounded once.

Vectors (shift, scale, gate) are [B, 1, D], or [B, N, D] where tokens have their own. What a kernel reads may be strided
and comes as a tuple `_strided`; what it writes, and statistics, are contiguous.

B batch · N or S tokens · D width · A heads · E head size · P pairs of channels
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PROGRAMS = 1024
"""Of a backward pass, before they take more than a token each: they fill a GPU."""
MOST_TOKENS = 32
"""Of a program: the sums are then a few percent of what a backward pass reads and writes."""


class ModulatedNorm(torch.autograd.Function):
    """`modulated_norm`. Keeps x, scale, and the mean and 1 / deviation of each token."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        assert shift.shape == scale.shape, f"shift is {tuple(shift.shape)}, scale {tuple(scale.shape)}"
        out = x_BND.new_empty(x_BND.shape)
        mean, rstd = x_BND.new_empty(2, *x_BND.shape[:2], dtype=_wide(x_BND))
        read = (_strided(tensor.expand_as(x_BND)) for tensor in (x_BND, shift, scale))
        _modulated_norm[_grid(x_BND)](*read, out, mean, rstd, eps, **_row(x_BND))
        ctx.save_for_backward(x_BND, scale, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, mean, rstd = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        sums, tokens = _sums(x, scale, 2)
        read = (_strided(tensor.expand_as(x)) for tensor in (x, scale, grad))
        _modulated_norm_backward[_grid(x, tokens)](*read, mean, rstd, grad_x, *sums, x.shape[1], tokens, **_row(x))
        grad_shift, grad_scale = sums.sum_to_size(2, *scale.shape).to(scale.dtype)
        return grad_x, grad_shift, grad_scale, None


@triton.jit
def _modulated_norm(
    x, shift, scale, out, mean, rstd, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    x_D = _load_row(x, batch, token, D, BLOCK, WIDE)
    mean_ = tl.sum(x_D, 0) / D
    centred_D = tl.where(tl.arange(0, BLOCK) < D, x_D - mean_, 0)
    rstd_ = tl.rsqrt(tl.sum(centred_D * centred_D, 0) / D + EPS)
    gain_D = 1 + _load_row(scale, batch, token, D, BLOCK, WIDE)
    shift_D = _load_row(shift, batch, token, D, BLOCK, WIDE)
    _store_row(out, row, centred_D * rstd_ * gain_D + shift_D, D, BLOCK)
    tl.store(mean + row, mean_)
    tl.store(rstd + row, rstd_)


@triton.jit
def _modulated_norm_backward(
    x,
    scale,
    grad,
    mean,
    rstd,
    grad_x,
    shift_sums,
    scale_sums,
    num_tokens,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """With x̂ = (x − mean)·rstd and g the gradient by x̂: ∂x = rstd·(g − mean(g) − x̂·mean(g·x̂))."""
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = group * tokens
    gain_D = 1 + _load_row(scale, batch, first, D, BLOCK, WIDE)
    shift_sum_D = tl.zeros([BLOCK], WIDE)
    scale_sum_D = tl.zeros([BLOCK], WIDE)
    for token in range(first, tl.minimum(first + tokens, num_tokens)):
        row = batch * num_tokens + token
        rstd_ = tl.load(rstd + row)
        normed_D = (_load_row(x, batch, token, D, BLOCK, WIDE) - tl.load(mean + row)) * rstd_
        grad_D = _load_row(grad, batch, token, D, BLOCK, WIDE)
        shift_sum_D += grad_D
        scale_sum_D += grad_D * normed_D
        grad_D *= gain_D
        along_ones = tl.sum(grad_D, 0) / D
        along_normed = tl.sum(grad_D * normed_D, 0) / D
        _store_row(grad_x, row, rstd_ * (grad_D - along_ones - normed_D * along_normed), D, BLOCK)
    row = batch * tl.num_programs(0) + group
    _store_row(shift_sums, row, shift_sum_D, D, BLOCK)
    _store_row(scale_sums, row, scale_sum_D, D, BLOCK)


class GatedResidual(torch.autograd.Function):
    """`gated_residual`. Keeps gate and y."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, gate: Tensor, y_BND: Tensor) -> Tensor:
        out = x_BND.new_empty(x_BND.shape)
        read = (_strided(tensor.expand_as(x_BND)) for tensor in (x_BND, gate, y_BND))
        _gated_residual[_grid(x_BND)](*read, out, **_row(x_BND))
        ctx.save_for_backward(gate, y_BND)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        grad_y = y.new_empty(y.shape)
        sums, tokens = _sums(y, gate, 1)
        read = (_strided(tensor.expand_as(y)) for tensor in (gate, y, grad))
        _gated_residual_backward[_grid(y, tokens)](*read, grad_y, sums, y.shape[1], tokens, **_row(y))
        return grad, sums[0].sum_to_size(gate.shape).to(gate.dtype), grad_y


@triton.jit
def _gated_residual(x, gate, y, out, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x_D = _load_row(x, batch, token, D, BLOCK, WIDE)
    gate_D = _load_row(gate, batch, token, D, BLOCK, WIDE)
    y_D = _load_row(y, batch, token, D, BLOCK, WIDE)
    _store_row(out, batch * tl.num_programs(0) + token, x_D + gate_D * y_D, D, BLOCK)


@triton.jit
def _gated_residual_backward(
    gate, y, grad, grad_y, sums, num_tokens, tokens, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = group * tokens
    gate_D = _load_row(gate, batch, first, D, BLOCK, WIDE)
    sum_D = tl.zeros([BLOCK], WIDE)
    for token in range(first, tl.minimum(first + tokens, num_tokens)):
        grad_D = _load_row(grad, batch, token, D, BLOCK, WIDE)
        sum_D += grad_D * _load_row(y, batch, token, D, BLOCK, WIDE)
        _store_row(grad_y, batch * num_tokens + token, grad_D * gate_D, D, BLOCK)
    _store_row(sums, batch * tl.num_programs(0) + group, sum_D, D, BLOCK)


class NormRotate(torch.autograd.Function):
    """`norm_rotate`. Keeps x, weight, cosine, sine, and 1 / rms of each head."""

    @staticmethod
    def forward(
        ctx: Any, x_BSAE: Tensor, weight_E: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
    ) -> Tensor:
        out = x_BSAE.new_empty(x_BSAE.shape)
        rstd = x_BSAE.new_empty(x_BSAE.shape[:-1], dtype=_wide(x_BSAE))
        tables = _tables(x_BSAE, cos, sin)
        _norm_rotate[_grid(x_BSAE)](_strided(x_BSAE), weight_E, *tables, out, rstd, eps, **_heads(x_BSAE))
        ctx.save_for_backward(x_BSAE, weight_E, cos, sin, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        tokens = _tokens(x)
        grid = _grid(x, tokens)
        sums = x.new_empty(*grid, x.shape[-1], dtype=_wide(x))
        read = _strided(x), _strided(grad), weight, *_tables(x, cos, sin), rstd
        _norm_rotate_backward[grid](*read, grad_x, sums, x.shape[1], tokens, **_heads(x))
        return grad_x, sums.sum((0, 1)).to(weight.dtype), None, None, None


@triton.jit
def _norm_rotate(
    x,
    weight,
    cos,
    sin,
    out,
    rstd,
    EPS: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    x_AE = _load_heads(x, batch, token, A, E, HEADS, BLOCK, WIDE)
    rstd_A = tl.rsqrt(tl.sum(x_AE * x_AE, 1) / E + EPS)
    out_AE = x_AE * rstd_A[:, None] * _load(weight, E, BLOCK, WIDE)[None, :]
    if cos is not None:
        cos_P = _load_row(cos, batch, token, E // 2, BLOCK // 2, WIDE)
        sin_P = _load_row(sin, batch, token, E // 2, BLOCK // 2, WIDE)
        out_AE = _turned(out_AE, cos_P, sin_P, HEADS, BLOCK)
    _store_heads(out, row, out_AE, A, E, HEADS, BLOCK)
    _store_row(rstd, row, rstd_A, A, HEADS)


@triton.jit
def _norm_rotate_backward(
    x,
    grad,
    weight,
    cos,
    sin,
    rstd,
    grad_x,
    sums,
    num_tokens,
    tokens,
    A: tl.constexpr,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient is turned back; then, with x̂ = x·rstd and g the gradient by x̂: ∂x = rstd·(g − x̂·mean(g·x̂))."""
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = group * tokens
    weight_E = _load(weight, E, BLOCK, WIDE)
    sum_AE = tl.zeros([HEADS, BLOCK], WIDE)
    for token in range(first, tl.minimum(first + tokens, num_tokens)):
        row = batch * num_tokens + token
        rstd_A = _load(rstd + row * A, A, HEADS, WIDE)
        normed_AE = _load_heads(x, batch, token, A, E, HEADS, BLOCK, WIDE) * rstd_A[:, None]
        grad_AE = _load_heads(grad, batch, token, A, E, HEADS, BLOCK, WIDE)
        if cos is not None:
            cos_P = _load_row(cos, batch, token, E // 2, BLOCK // 2, WIDE)
            sin_P = _load_row(sin, batch, token, E // 2, BLOCK // 2, WIDE)
            grad_AE = _turned(grad_AE, cos_P, -sin_P, HEADS, BLOCK)
        sum_AE += grad_AE * normed_AE
        grad_AE *= weight_E[None, :]
        along_A = tl.sum(grad_AE * normed_AE, 1) / E
        grad_x_AE = rstd_A[:, None] * (grad_AE - normed_AE * along_A[:, None])
        _store_heads(grad_x, row, grad_x_AE, A, E, HEADS, BLOCK)
    _store_row(sums, group * tl.num_programs(1) + batch, tl.sum(sum_AE, 0), E, BLOCK)


@triton.jit
def _turned(x_AE, cos_P, sin_P, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Channel pairs (2i, 2i+1) turned."""
    even_AP, odd_AP = tl.split(tl.reshape(x_AE, (HEADS, BLOCK // 2, 2)))
    cos_AP, sin_AP = cos_P[None, :], sin_P[None, :]
    turned_AP2 = tl.join(even_AP * cos_AP - odd_AP * sin_AP, even_AP * sin_AP + odd_AP * cos_AP)
    return tl.reshape(turned_AP2, (HEADS, BLOCK))


# What is read is 0 in the lanes past the last channel or head.


@triton.jit
def _load(x, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    return tl.load(x + channel, mask=channel < D, other=0).to(WIDE)


@triton.jit
def _load_row(x, batch, token, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    return _load(x[0] + batch * x[1] + token * x[2], D, BLOCK, WIDE)


@triton.jit
def _store_row(x, row, value_D, D: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    tl.store(x + row * D + channel, value_D, mask=channel < D)


@triton.jit
def _load_heads(
    x, batch, token, A: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    place = x[0] + batch * x[1] + token * x[2] + head * x[3] + channel
    return tl.load(place, mask=(head < A) & (channel < E), other=0).to(WIDE)


@triton.jit
def _store_heads(x, row, value_AE, A: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(x + row * A * E + head * E + channel, value_AE, mask=(head < A) & (channel < E))


def _strided(x: Tensor) -> tuple[Any, ...]:
    """For a kernel: x, its channels side by side, and its strides between samples, between tokens, between heads."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, *x.stride()[:-1]


def _tables(x_BSAE: Tensor, *tables: Tensor | None) -> list[tuple[Any, ...] | None]:
    """Cosine and sine for a kernel, of each sample and token."""
    batch, num_tokens, _, size = x_BSAE.shape
    return [table if table is None else _strided(table.expand(batch, num_tokens, size // 2)) for table in tables]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tokens(x: Tensor) -> int:
    """How many a program of a backward pass takes, where they share their vectors."""
    return min(max(x.shape[0] * x.shape[1] // PROGRAMS, 1), MOST_TOKENS)


def _grid(x: Tensor, tokens: int = 1) -> tuple[int, int]:
    """Programs for x [B, N, …], each of so many tokens of a sample."""
    return triton.cdiv(x.shape[1], tokens), x.shape[0]


def _sums(x_BND: Tensor, vector: Tensor, num: int) -> tuple[Tensor, int]:
    """Room for `num` gradients by vectors [num, B, groups, D], and how many tokens are a group."""
    batch, _, width = x_BND.shape
    tokens = _tokens(x_BND) if vector.shape[1] == 1 else 1
    shape = (batch, _grid(x_BND, tokens)[0], width)
    dtype = vector.dtype if vector.shape == shape else _wide(x_BND)
    return x_BND.new_empty(num, *shape, dtype=dtype), tokens


def _row(x_BND: Tensor) -> dict[str, Any]:
    """The constants of a kernel whose programs take rows of D channels."""
    width = x_BND.shape[-1]
    block = triton.next_power_of_2(width)
    return {"D": width, "BLOCK": block, **_lanes(x_BND, block)}


def _heads(x_BSAE: Tensor) -> dict[str, Any]:
    """Of one whose programs take A heads of E channels."""
    num_heads, size = x_BSAE.shape[2:]
    heads, block = triton.next_power_of_2(num_heads), triton.next_power_of_2(size)
    return {"A": num_heads, "E": size, "HEADS": heads, "BLOCK": block, **_lanes(x_BSAE, heads * block)}


def _lanes(x: Tensor, num: int) -> dict[str, Any]:
    """The type of `num` lanes, and their warps: 16 lanes a thread."""
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"WIDE": wide, "num_warps": min(max(num // 512, 1), 8)}
