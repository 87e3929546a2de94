"""Weights in the formats people use: diffusers' folders and the authors' single files, of SD3, SD3.5 and FLUX.1.

`load` reads any of them and this stack's own, `save` writes the published ones. Both are strict: every tensor is
accounted for, and what a format cannot hold is refused. Tensors are read and written one by one, so that one copy of a
model is held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stack.config import UserError
from stack.files import publish
from stack.models.keys import SAME, Family, Form, Layout, Tensors, rows
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.models.tensor_files import Pending, TensorSource, write_file, write_folder
from stack.nn.embed import MAX_PERIOD, sincos_positions, table_coordinates

CLASSES: dict[Family, str] = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
POSITIONS: dict[Layout, str] = {"original": "pos_embed", "diffusers": "pos_embed.pos_embed"}
PREFIX = "model.diffusion_model."
"""Of the names in SD3's single file, which may hold an autoencoder and text encoders as well."""
BESIDE = ("first_stage_model.", "text_encoders.")
SD3_HEAD_SIZE = 64
SHARD_BYTES = 5 * 10**9
POSITION_TOLERANCE = 0.01
"""bfloat16 moves a table's values by up to 2⁻⁹."""


def load(path: Path, dtype: torch.dtype | None = None) -> tuple[MMDiT, MMDiTConfig]:
    """The model in `path`, in the file's dtype or in `dtype`, on the CPU.

    path: a diffusers folder (of a pipeline or of its transformer), a .safetensors in the authors' names, or a snapshot
    or export of this stack. Raises UserError where it is none of these, lacks a tensor or has one too many.
    """
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    source = TensorSource(folder)
    try:
        config, table, prefix, positions = _describe(source)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of JSON, of a configuration, of shapes
        raise UserError(f"{folder}: cannot be understood as a model: {' '.join(str(error).split())[:200]}") from None
    with torch.device("meta"):
        model = MMDiT(config)
    holders = {row.ours: row for row in table} if table else None
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        _, theirs, form = holders[name] if holders else Tensors(name, (name,), SAME)
        parts = [source.take(prefix + part) for part in theirs]
        weight = form.read(torch.cat(parts) if len(parts) > 1 else parts[0], config)
        if weight.shape != parameter.shape:
            raise UserError(f"{path}: {theirs[0]} gives {tuple(weight.shape)}, expected {tuple(parameter.shape)}")
        weights[name] = weight.to(dtype or weight.dtype).contiguous()
    if positions is not None:
        _check_positions(source.take(prefix + positions), config, f"{path}: {positions}")
    source.check_all_taken(BESIDE if prefix else ())
    model.load_state_dict(weights, assign=True)
    return model, config


def save(
    model: MMDiT,
    path: Path,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` in `dtype` (its own if None): a diffusers folder, or one file in the authors' names.

    metadata: for the header. shard_bytes: a folder's weights are cut into files of at most so many bytes.
    Raises UserError where the format cannot hold this architecture.
    """
    family = family_of(model.config, layout)
    prefix = PREFIX if (family, layout) == ("sd3", "original") else ""
    tensors = list(_tensors(model, family, layout, prefix))
    dtype = dtype or model.img_in.weight.dtype
    if layout == "original":
        write_file(path, tensors, dtype, metadata or {})
        return
    path.mkdir(parents=True, exist_ok=True)
    write_folder(path, tensors, dtype, {"format": "pt", **(metadata or {})}, shard_bytes)
    with publish(path / "config.json") as temporary:
        temporary.write_text(json.dumps(diffusers_config(model.config), indent=2), encoding="utf-8")


def _tensors(model: MMDiT, family: Family, layout: Layout, prefix: str) -> Iterator[Pending]:
    config, parameters = model.config, {name: p.detach() for name, p in model.named_parameters()}
    if family == "sd3":
        shape = (1, config.position_table_size**2, config.width)
        yield Pending(prefix + POSITIONS[layout], shape, lambda: _position_table(config))
    for ours, theirs, form in rows(config, family, layout):
        if ours in parameters:
            parts = _Parts(parameters[ours], form, len(theirs), config)
            for place, name in enumerate(theirs):
                yield Pending(prefix + name, parts.shape(place), partial(parts.__getitem__, place))


class _Parts:
    """One of our tensors as theirs: each but the last has the model's width of rows."""

    def __init__(self, tensor: Tensor, form: Form, count: int, config: MMDiTConfig):
        self._tensor, self._form, self._config = tensor, form, config
        self._rows = [config.width] * (count - 1) + [len(tensor) - config.width * (count - 1)]

    def __getitem__(self, place: int) -> Tensor:
        return self._form.write(self._tensor, self._config).split(self._rows)[place]

    def shape(self, place: int) -> tuple[int, ...]:
        whole = self._form.write(self._tensor.to("meta"), self._config)
        return (self._rows[place], *whole.shape[1:])


def _describe(source: TensorSource) -> tuple[MMDiTConfig, list[Tensors], str, str | None]:
    """The architecture, the table of names (empty: ours), what stands before each name, the position table's name."""
    try:
        own = json.loads(source.metadata.get("config", "{}"))
        if "model" in own:
            return MMDiTConfig(**own["model"]), [], "", None
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source.path}: its metadata is not that of a snapshot of this stack: {reason}") from None
    description = source.path / "config.json"
    if description.is_file():
        config, family = _from_diffusers(json.loads(description.read_text(encoding="utf-8")), description)
        return config, _table(config, family, "diffusers"), "", POSITIONS["diffusers"] if family == "sd3" else None
    prefix = PREFIX if any(name.startswith(PREFIX) for name in source.names) else ""
    names = {name.removeprefix(prefix) for name in source.names}
    if "joint_blocks.0.x_block.attn.qkv.weight" in names:
        config = _sd3_config(source, prefix, names)
        return config, _table(config, "sd3", "original"), prefix, POSITIONS["original"]
    if "double_blocks.0.img_attn.qkv.weight" in names:
        config = _flux_config(source, prefix, names)
        return config, _table(config, "flux", "original"), prefix, None
    raise UserError(
        f"{source.path}: neither SD3 nor FLUX.1, in the authors' names or diffusers', nor a model of this stack"
    )


def _table(config: MMDiTConfig, family: Family, layout: Layout) -> list[Tensors]:
    return list(rows(config, family, layout))


def _count(names: set[str], prefix: str) -> int:
    """Blocks named `prefix`.0, `prefix`.1 …"""
    return len({name.split(".")[1] for name in names if name.startswith(f"{prefix}.")})


def _sd3_config(source: TensorSource, prefix: str, names: set[str]) -> MMDiTConfig:
    def shape(name: str) -> tuple[int, ...]:
        return source.shape(prefix + name)

    width, channels, patch, _ = shape("x_embedder.proj.weight")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    table_size = math.isqrt(shape("pos_embed")[1])
    return MMDiTConfig(
        depth=_count(names, "joint_blocks"),
        width=width,
        num_heads=width // (shape(norm)[0] if norm in names else SD3_HEAD_SIZE),
        patch_size=patch,
        in_channels=channels,
        context_dim=shape("context_embedder.weight")[1],
        pooled_dim=shape("y_embedder.mlp.0.weight")[1],
        qk_norm=norm in names,
        image_attention=sum(name.endswith("x_block.attn2.proj.bias") for name in names),
        position_table_size=table_size,
        position_base_size=_base_size(source.take(prefix + "pos_embed")[0], table_size),
    )


def _flux_config(source: TensorSource, prefix: str, names: set[str]) -> MMDiTConfig:
    def shape(name: str) -> tuple[int, ...]:
        return source.shape(prefix + name)

    width, features = shape("img_in.weight")
    (head_size,) = shape("double_blocks.0.img_attn.norm.query_norm.scale")
    return MMDiTConfig(
        depth=_count(names, "double_blocks"),
        single_depth=_count(names, "single_blocks"),
        width=width,
        num_heads=width // head_size,
        in_channels=features // 4,
        context_dim=shape("txt_in.weight")[1],
        pooled_dim=shape("vector_in.in_layer.weight")[1],
        qk_norm=True,
        guidance_embedding="guidance_in.in_layer.weight" in names,
        rope_axes=flux_axes(head_size),
    )


def flux_axes(head_size: int) -> tuple[int, int, int]:
    """FLUX.1's shares of a head: 16, 56 and 56 of 128."""
    return head_size // 8, head_size * 7 // 16, head_size * 7 // 16


def family_of(config: MMDiTConfig, layout: Layout) -> Family:
    """Whose format holds this architecture. UserError, with the key, where none does."""
    family: Family = "flux" if config.rope_axes else "sd3"
    needs: dict[str, Any] = {"mlp_ratio": 4}
    if family == "flux":
        needs |= {"qk_norm": True, "patch_size": 2, "image_attention": 0}
        if layout == "original":
            needs["rope_axes"] = flux_axes(config.head_size)
    else:
        needs |= {"single_depth": 0, "guidance_embedding": False, "position_origin": 0}
        needs["position_base_size"] = round(config.position_base_size)
        if layout == "original":
            first = next(_position_rows(config)).bfloat16()
            needs["position_base_size"] = _base_size(first, config.position_table_size)
        if layout == "original" and not config.qk_norm:
            needs["num_heads"] = config.width // SD3_HEAD_SIZE
    for key, needed in needs.items():
        if getattr(config, key) != needed:
            raise UserError(
                f"the {layout} format of {family} has {key}={needed} always, this model {getattr(config, key)}"
            )
    return family


def diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """diffusers' config.json of the transformer."""
    family = family_of(config, "diffusers")
    common = {
        "_class_name": CLASSES[family],
        "num_layers": config.depth,
        "attention_head_dim": config.head_size,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
    }
    if family == "flux":
        return common | {
            "patch_size": 1,
            "in_channels": config.in_channels * config.patch_size**2,
            "num_single_layers": config.single_depth,
            "guidance_embeds": config.guidance_embedding,
            "axes_dims_rope": list(config.rope_axes),
        }
    return common | {
        "sample_size": round(config.position_base_size * config.patch_size),
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "caption_projection_dim": config.width,
        "pos_embed_max_size": config.position_table_size,
        "dual_attention_layers": list(range(config.image_attention)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _from_diffusers(values: dict[str, Any], path: Path) -> tuple[MMDiTConfig, Family]:
    """The reverse of `diffusers_config`. UserError where the file asks for what neither architecture has."""
    families = {name: family for family, name in CLASSES.items()}
    if values.get("_class_name") not in families:
        raise UserError(f"{path}: {values.get('_class_name')} is not one of {', '.join(families)}")
    family = families[values["_class_name"]]
    try:
        config = _flux_of(values) if family == "flux" else _sd3_of(values)
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None
    optional = {"dual_attention_layers": [], "qk_norm": None, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False}
    for key, held in diffusers_config(config).items():
        has = values.get(key, optional.get(key, held))
        if has != held and not (key == "out_channels" and has is None):
            raise UserError(f"{path}: {key} is {has}, where this stack's model would have {held}")
    return config, family


def _common_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "depth": values["num_layers"],
        "width": values["num_attention_heads"] * values["attention_head_dim"],
        "num_heads": values["num_attention_heads"],
        "context_dim": values["joint_attention_dim"],
        "pooled_dim": values["pooled_projection_dim"],
    }


def _sd3_of(values: Mapping[str, Any]) -> MMDiTConfig:
    return MMDiTConfig(
        **_common_of(values),
        patch_size=values["patch_size"],
        in_channels=values["in_channels"],
        qk_norm=values.get("qk_norm") is not None,
        image_attention=len(values.get("dual_attention_layers") or ()),
        position_table_size=values["pos_embed_max_size"],
        position_base_size=values["sample_size"] // values["patch_size"],
    )


def _flux_of(values: Mapping[str, Any]) -> MMDiTConfig:
    return MMDiTConfig(
        **_common_of(values),
        single_depth=values["num_single_layers"],
        in_channels=values["in_channels"] // 4,
        qk_norm=True,
        guidance_embedding=values.get("guidance_embeds", False),
        rope_axes=values.get("axes_dims_rope", (16, 56, 56)),
    )


def _position_rows(config: MMDiTConfig) -> Iterator[Tensor]:
    """The table's rows [table size, D], one after another."""
    side = table_coordinates(config.position_table_size, config.position_table_size, config.position_base_size)
    for row in side:
        yield sincos_positions(row[None], side, config.width)


def _base_size(table_ND: Tensor, table_size: int) -> int:
    """Of a position table: its second column begins with the sines of one step.

    Of the width/4 frequencies one is taken in which no step comes near a quarter turn, nor a sine near zero.
    """
    quarter = table_ND.shape[1] // 4
    sine = table_ND[1, quarter // 2].item()
    return round(math.asin(sine) * MAX_PERIOD ** (quarter // 2 / quarter) * table_size)


def _position_table(config: MMDiTConfig) -> Tensor:
    return torch.cat(list(_position_rows(config)))[None]


def _check_positions(table: Tensor, config: MMDiTConfig, name: str) -> None:
    """A published model stores its table; this stack computes it."""
    rows_of: Sequence[Tensor] = table[0].split(config.position_table_size)
    if table.shape != (1, config.position_table_size**2, config.width) or any(
        (theirs.float() - ours).abs().max() > POSITION_TOLERANCE
        for theirs, ours in zip(rows_of, _position_rows(config), strict=True)
    ):
        raise UserError(f"{name} is not the sin-cos table of {config.position_table_size} patches a side")
