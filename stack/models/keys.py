"""Where published files keep the parameters of an MM-DiT: tables of our modules and theirs.

Four of them: SD3 and FLUX.1, each under the authors' names (one file) and under diffusers' (a folder). A row says our
module, theirs, and how the two hold a tensor; several of theirs stand one below another in ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stack.models.mmdit import MMDiTConfig

Family = Literal["sd3", "flux"]
Layout = Literal["original", "diffusers"]


class Form(NamedTuple):
    """Theirs → ours and back. Both give a tensor of the same numbers in another order or shape."""

    read: Callable[[Tensor, MMDiTConfig], Tensor]
    write: Callable[[Tensor, MMDiTConfig], Tensor]


def _swap(x: Tensor, config: MMDiTConfig) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


def _to_rows(x: Tensor, config: MMDiTConfig) -> Tensor:
    return x.flatten(1) if x.ndim == 4 else x


def _to_convolution(x: Tensor, config: MMDiTConfig) -> Tensor:
    p = config.patch_size
    return x.unflatten(1, (-1, p, p)) if x.ndim == 2 else x


def _channels_last(x: Tensor, config: MMDiTConfig) -> Tensor:
    return rearrange(x, "(C p q) ... -> (p q C) ...", p=config.patch_size, q=config.patch_size)


def _channels_first(x: Tensor, config: MMDiTConfig) -> Tensor:
    return rearrange(x, "(p q C) ... -> (C p q) ...", p=config.patch_size, q=config.patch_size)


SAME = Form(lambda x, _: x, lambda x, _: x)
SCALE_FIRST = Form(_swap, _swap)  # diffusers has (scale, shift) where the authors have (shift, scale)
CONVOLUTION = Form(_to_rows, _to_convolution)
CHANNELS_FIRST = Form(_channels_last, _channels_first)  # FLUX's patches are (c, p, q) on both sides

Row = tuple[str, str] | tuple[str, str, Form]


class Table(NamedTuple):
    """`top` as it stands; `double` and `single` once a block, with its number after the prefix."""

    top: list[Row]
    double: tuple[str, list[Row]]
    last: list[Row]
    """Over `double`, in the block whose text nothing reads."""
    single: tuple[str, list[Row]] = ("", [])


# Norms have one tensor, named in full; of all other modules `weight` and `bias` are meant.
# fmt: off
_DIFFUSERS_DOUBLE: list[Row] = [
    ("img.modulation",                              "norm1.linear"),
    ("img.qkv.linear",                              "attn.to_q attn.to_k attn.to_v"),
    ("img.qkv.heads.norm_q",                        "attn.norm_q.weight"),
    ("img.qkv.heads.norm_k",                        "attn.norm_k.weight"),
    ("img.out",                                     "attn.to_out.0"),
    ("img.image_attention.qkv.linear",              "attn2.to_q attn2.to_k attn2.to_v"),
    ("img.image_attention.qkv.heads.norm_q",        "attn2.norm_q.weight"),
    ("img.image_attention.qkv.heads.norm_k",        "attn2.norm_k.weight"),
    ("img.image_attention.out",                     "attn2.to_out.0"),
    ("img.mlp.0",                                   "ff.net.0.proj"),
    ("img.mlp.2",                                   "ff.net.2"),
    ("txt.modulation",                              "norm1_context.linear"),
    ("txt.qkv.linear",                              "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("txt.qkv.heads.norm_q",                        "attn.norm_added_q.weight"),
    ("txt.qkv.heads.norm_k",                        "attn.norm_added_k.weight"),
    ("txt.out",                                     "attn.to_add_out"),
    ("txt.mlp.0",                                   "ff_context.net.0.proj"),
    ("txt.mlp.2",                                   "ff_context.net.2"),
]
TABLES: dict[tuple[Family, Layout], Table] = {
    ("sd3", "original"): Table(
        top=[
            ("img_in",                              "x_embedder.proj", CONVOLUTION),
            ("txt_in",                              "context_embedder"),
            ("time_in.inner",                       "t_embedder.mlp.0"),
            ("time_in.outer",                       "t_embedder.mlp.2"),
            ("pooled_in.inner",                     "y_embedder.mlp.0"),
            ("pooled_in.outer",                     "y_embedder.mlp.2"),
            ("final.modulation",                    "final_layer.adaLN_modulation.1"),
            ("final.linear",                        "final_layer.linear"),
        ],
        double=("joint_blocks", [
            ("img.modulation",                      "x_block.adaLN_modulation.1"),
            ("img.qkv.linear",                      "x_block.attn.qkv"),
            ("img.qkv.heads.norm_q",                "x_block.attn.ln_q.weight"),
            ("img.qkv.heads.norm_k",                "x_block.attn.ln_k.weight"),
            ("img.out",                             "x_block.attn.proj"),
            ("img.image_attention.qkv.linear",      "x_block.attn2.qkv"),
            ("img.image_attention.qkv.heads.norm_q", "x_block.attn2.ln_q.weight"),
            ("img.image_attention.qkv.heads.norm_k", "x_block.attn2.ln_k.weight"),
            ("img.image_attention.out",             "x_block.attn2.proj"),
            ("img.mlp.0",                           "x_block.mlp.fc1"),
            ("img.mlp.2",                           "x_block.mlp.fc2"),
            ("txt.modulation",                      "context_block.adaLN_modulation.1"),
            ("txt.qkv.linear",                      "context_block.attn.qkv"),
            ("txt.qkv.heads.norm_q",                "context_block.attn.ln_q.weight"),
            ("txt.qkv.heads.norm_k",                "context_block.attn.ln_k.weight"),
            ("txt.out",                             "context_block.attn.proj"),
            ("txt.mlp.0",                           "context_block.mlp.fc1"),
            ("txt.mlp.2",                           "context_block.mlp.fc2"),
        ]),
        last=[],
    ),
    ("sd3", "diffusers"): Table(
        top=[
            ("img_in",                              "pos_embed.proj", CONVOLUTION),
            ("txt_in",                              "context_embedder"),
            ("time_in.inner",                       "time_text_embed.timestep_embedder.linear_1"),
            ("time_in.outer",                       "time_text_embed.timestep_embedder.linear_2"),
            ("pooled_in.inner",                     "time_text_embed.text_embedder.linear_1"),
            ("pooled_in.outer",                     "time_text_embed.text_embedder.linear_2"),
            ("final.modulation",                    "norm_out.linear", SCALE_FIRST),
            ("final.linear",                        "proj_out"),
        ],
        double=("transformer_blocks", _DIFFUSERS_DOUBLE),
        last=[("txt.modulation",                    "norm1_context.linear", SCALE_FIRST)],
    ),
    ("flux", "original"): Table(
        top=[
            ("img_in",                              "img_in"),
            ("txt_in",                              "txt_in"),
            ("time_in.inner",                       "time_in.in_layer"),
            ("time_in.outer",                       "time_in.out_layer"),
            ("pooled_in.inner",                     "vector_in.in_layer"),
            ("pooled_in.outer",                     "vector_in.out_layer"),
            ("guidance_in.inner",                   "guidance_in.in_layer"),
            ("guidance_in.outer",                   "guidance_in.out_layer"),
            ("final.modulation",                    "final_layer.adaLN_modulation.1"),
            ("final.linear",                        "final_layer.linear", CHANNELS_FIRST),
        ],
        double=("double_blocks", [
            ("img.modulation",                      "img_mod.lin"),
            ("img.qkv.linear",                      "img_attn.qkv"),
            ("img.qkv.heads.norm_q",                "img_attn.norm.query_norm.scale"),
            ("img.qkv.heads.norm_k",                "img_attn.norm.key_norm.scale"),
            ("img.out",                             "img_attn.proj"),
            ("img.mlp.0",                           "img_mlp.0"),
            ("img.mlp.2",                           "img_mlp.2"),
            ("txt.modulation",                      "txt_mod.lin"),
            ("txt.qkv.linear",                      "txt_attn.qkv"),
            ("txt.qkv.heads.norm_q",                "txt_attn.norm.query_norm.scale"),
            ("txt.qkv.heads.norm_k",                "txt_attn.norm.key_norm.scale"),
            ("txt.out",                             "txt_attn.proj"),
            ("txt.mlp.0",                           "txt_mlp.0"),
            ("txt.mlp.2",                           "txt_mlp.2"),
        ]),
        last=[],
        single=("single_blocks", [
            ("modulation",                          "modulation.lin"),
            ("inner",                               "linear1"),
            ("heads.norm_q",                        "norm.query_norm.scale"),
            ("heads.norm_k",                        "norm.key_norm.scale"),
            ("outer",                               "linear2"),
        ]),
    ),
    ("flux", "diffusers"): Table(
        top=[
            ("img_in",                              "x_embedder"),
            ("txt_in",                              "context_embedder"),
            ("time_in.inner",                       "time_text_embed.timestep_embedder.linear_1"),
            ("time_in.outer",                       "time_text_embed.timestep_embedder.linear_2"),
            ("pooled_in.inner",                     "time_text_embed.text_embedder.linear_1"),
            ("pooled_in.outer",                     "time_text_embed.text_embedder.linear_2"),
            ("guidance_in.inner",                   "time_text_embed.guidance_embedder.linear_1"),
            ("guidance_in.outer",                   "time_text_embed.guidance_embedder.linear_2"),
            ("final.modulation",                    "norm_out.linear", SCALE_FIRST),
            ("final.linear",                        "proj_out", CHANNELS_FIRST),
        ],
        double=("transformer_blocks", _DIFFUSERS_DOUBLE),
        last=[],
        single=("single_transformer_blocks", [
            ("modulation",                          "norm.linear"),
            ("inner",                               "attn.to_q attn.to_k attn.to_v proj_mlp"),
            ("heads.norm_q",                        "attn.norm_q.weight"),
            ("heads.norm_k",                        "attn.norm_k.weight"),
            ("outer",                               "proj_out"),
        ]),
    ),
}
# fmt: on


class Tensors(NamedTuple):
    """One of our tensors: theirs that hold it, one below another, and how."""

    ours: str
    theirs: tuple[str, ...]
    form: Form


def rows(config: MMDiTConfig, family: Family, layout: Layout) -> Iterator[Tensors]:
    """Of every tensor that a model of `family` with as many blocks as `config` can have; one without QK-norm, image
    attention or a guidance embedding has not all of them."""
    table = TABLES[family, layout]
    yield from _expand(table.top, "", "")
    prefix, double = table.double
    for index in range(config.depth):
        is_last = index == config.depth - 1 and config.single_depth == 0
        of_block = {row[0]: row for row in double + (table.last if is_last else [])}  # the last's win
        yield from _expand(of_block.values(), f"blocks.{index}.", f"{prefix}.{index}.")
    prefix, single = table.single
    for index in range(config.single_depth):
        yield from _expand(single, f"single_blocks.{index}.", f"{prefix}.{index}.")


def _expand(table: Iterable[Row], ours: str, theirs: str) -> Iterator[Tensors]:
    for module, names, *form in table:
        parts = [theirs + name for name in names.split()]
        if module.endswith(("norm_q", "norm_k")):
            yield Tensors(f"{ours}{module}.weight", tuple(parts), SAME)
        else:
            for leaf in ("weight", "bias"):
                yield Tensors(f"{ours}{module}.{leaf}", tuple(f"{p}.{leaf}" for p in parts), *(form or [SAME]))
