"""Published models as rows of one table (SD3: arXiv 2403.03206, §5.3; SD3.5 and FLUX.1: the authors' code), and small
ones for the demo and tests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from stack.config import UserError

if TYPE_CHECKING:
    from stack.models.mmdit import MMDiTConfig

# fmt: off
COLUMNS = ("depth", "single_depth", "width", "num_heads", "in_channels", "context_dim", "pooled_dim", "qk_norm",
           "image_attention", "guidance_embedding", "position_table_size", "position_base_size", "rope_axes")
ROWS: dict[str, tuple[Any, ...]] = {
    #                 double single width heads ch context pooled qk-norm img-attn guidance table base rope axes
    "sd3-d15":        (   15,     0,   960,   15,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3-d15-qknorm": (   15,     0,   960,   15,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "sd3-d18":        (   18,     0,  1152,   18,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3-d18-qknorm": (   18,     0,  1152,   18,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "sd3-d24":        (   24,     0,  1536,   24,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3-d24-qknorm": (   24,     0,  1536,   24,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "sd3-d30":        (   30,     0,  1920,   30,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3-d30-qknorm": (   30,     0,  1920,   30,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "sd3-d38":        (   38,     0,  2432,   38,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3-d38-qknorm": (   38,     0,  2432,   38,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "sd3-medium":     (   24,     0,  1536,   24,  16,  4096,  2048, False,      0,    False,  192,  64, ()),
    "sd3.5-medium":   (   24,     0,  1536,   24,  16,  4096,  2048, True,      13,    False,  384,  64, ()),
    "sd3.5-large":    (   38,     0,  2432,   38,  16,  4096,  2048, True,       0,    False,  192,  64, ()),
    "flux-dev":       (   19,    38,  3072,   24,  16,  4096,   768, True,       0,    True,   192,  64, (16, 56, 56)),
    "flux-schnell":   (   19,    38,  3072,   24,  16,  4096,   768, True,       0,    False,  192,  64, (16, 56, 56)),
    "mmdit-demo":     (    4,     0,   192,    6,   4,   128,   128, True,       0,    False,   16,  16, ()),
    "mmdit-test":     (    2,     0,    64,    2,   4,    32,    32, True,       0,    False,   16,  16, ()),
    "flux-test":      (    2,     2,    64,    2,   4,    32,    32, True,       0,    False,  192,  64, (4, 14, 14)),
}
# fmt: on
PRESETS = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in ROWS.items()}


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over the row that their key `preset` names, if any.

    Raises UserError for an unknown preset, with the nearest known name.
    """
    name = values.get("preset")
    if name is None:
        return dict(values)
    if str(name) not in PRESETS:  # a list would not hash
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known presets: {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {name!r}, {hint}")
    return {**PRESETS[str(name)], **values}


def parameter_counts(config: MMDiTConfig) -> tuple[int, int]:
    """Number of parameters without and with the position table, which published counts include."""
    from stack.models.mmdit import MMDiT  # mmdit imports this module for its config

    with torch.device("meta"):
        trained = sum(parameter.numel() for parameter in MMDiT(config).parameters())
    table = config.position_table_size**2 * config.width if not config.rope_axes else 0
    return trained, trained + table
