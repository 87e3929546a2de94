"""How an MM-DiT is computed: its attention, its compilation, and what its backward pass computes again.

None of it changes what the model is: a snapshot does not know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from stack.config import Config, UserError
from stack.models.mmdit import Block, MMDiT, MMDiTConfig
from stack.nn.attention import Backend, choose


class ComputeConfig(Config):
    attention: Backend = "auto"
    """auto takes the fastest that runs here; another that does not run here is an error."""
    compile: bool = False
    """torch.compile, one kind of block at a time: all blocks of a kind share one compilation, whatever the
    captions' lengths, and a second one for batches whose captions are all of one length."""
    recompute: Literal["none", "all", "selective"] = "none"
    """What the backward pass computes again instead of keeping it in memory. all: a block's whole forward pass
    (arXiv 1604.06174). selective: all but attention, whose result is kept, of sdpa and varlen."""
    recompute_every: PositiveInt = 1
    """Of every so many blocks, one is computed again."""


def check(config: ComputeConfig, model: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> None:
    """UserError where a training of `model` in `dtype` on `device` cannot compute as `config` says."""
    attention = choose(config.attention, device, dtype, model.head_size, backward=True)
    if config.recompute == "selective" and attention not in ("sdpa", "varlen"):
        raise UserError(f"compute.recompute=selective keeps results of sdpa and varlen, not of attention={attention}")


def configure(network: nn.Module, config: ComputeConfig) -> None:
    """Make an MM-DiT compute as `config` says; other networks have nothing to configure."""
    if not isinstance(network, MMDiT):
        return
    network.attention = config.attention
    recompute = {"none": None, "all": {}, "selective": {"context_fn": _selective()}}[config.recompute]
    blocks = [block for block in network.modules() if isinstance(block, Block)]
    for number, block in enumerate(blocks):
        block.recompute = recompute if number % config.recompute_every == 0 else None
        if config.compile:
            block.compile(dynamic=True)


def _selective() -> Callable[[], Any]:
    """Keeps the results of attention, whichever operator of sdpa's and varlen's computes it."""
    import torch.nn.attention.varlen

    aten = torch.ops.aten
    kept = [
        torch.ops.mmdit.attend_samples.default,
        torch.ops.torch_attn._varlen_attn.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    return partial(create_selective_checkpoint_contexts, kept)
