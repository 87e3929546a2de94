"""Published models as rows of one table (SD3: arXiv 2403.03206, §5.3), and the demo's small ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from stack.config import UserError

if TYPE_CHECKING:
    from stack.models.mmdit import MMDiTConfig

# fmt: off
COLUMNS = ("depth", "width", "num_heads", "patch_size", "in_channels", "context_dim", "pooled_dim", "qk_norm",
           "position_table_size", "position_base_size")
ROWS: dict[str, tuple[Any, ...]] = {
    #                 depth width heads patch ch context pooled qk-norm table base
    "sd3-d15":        (15,   960,  15,    2,  16,  4096,  2048, False,   192,  64),
    "sd3-d15-qknorm": (15,   960,  15,    2,  16,  4096,  2048, True,    192,  64),
    "sd3-d18":        (18,  1152,  18,    2,  16,  4096,  2048, False,   192,  64),
    "sd3-d18-qknorm": (18,  1152,  18,    2,  16,  4096,  2048, True,    192,  64),
    "sd3-d24":        (24,  1536,  24,    2,  16,  4096,  2048, False,   192,  64),
    "sd3-d24-qknorm": (24,  1536,  24,    2,  16,  4096,  2048, True,    192,  64),
    "sd3-d30":        (30,  1920,  30,    2,  16,  4096,  2048, False,   192,  64),
    "sd3-d30-qknorm": (30,  1920,  30,    2,  16,  4096,  2048, True,    192,  64),
    "sd3-d38":        (38,  2432,  38,    2,  16,  4096,  2048, False,   192,  64),
    "sd3-d38-qknorm": (38,  2432,  38,    2,  16,  4096,  2048, True,    192,  64),
    "mmdit-demo":     ( 4,   192,   6,    2,   4,   128,   128, True,     16,  16),
    "mmdit-test":     ( 2,    64,   2,    2,   4,    32,    32, True,     16,  16),
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
    table = config.position_table_size**2 * config.width if config.positions == "sincos" else 0
    return trained, trained + table
