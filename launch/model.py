"""`mmdit model`."""

from __future__ import annotations

import json

import click


@click.command("model")
@click.argument("preset", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.option("--size", default=None, type=int, help="Image side in pixels; default 1024, the small presets' own 32.")
@click.option("--text-tokens", default=None, type=int, help="Default 154 for SD3, 256 for FLUX; 24 for small ones.")
def command(preset: str | None, as_json: bool, size: int | None, text_tokens: int | None) -> None:
    """List the model presets (or PRESET) with parameters and FLOPs a sample."""
    from stack.config import validate
    from stack.models.flops import flops_per_sample
    from stack.models.mmdit import MMDiTConfig
    from stack.models.presets import PRESETS, parameter_counts

    rows = []
    for name in [preset] if preset else PRESETS:
        config = validate(MMDiTConfig, {"preset": name}, "mmdit model")
        small, flux = not name.startswith(("sd3", "flux-dev", "flux-schnell")), bool(config.rope_axes)
        side, tokens = size or (32 if small else 1024), text_tokens or (24 if small else 256 if flux else 154)
        image_tokens = (side // ((4 if small else 8) * config.patch_size)) ** 2
        bare, whole = parameter_counts(config)
        forward, both = flops_per_sample(config, image_tokens, tokens)
        rows.append(
            {
                "preset": name,
                "depth": config.depth,
                "single_depth": config.single_depth,
                "width": config.width,
                "heads": config.num_heads,
                "parameters": bare,
                "parameters_with_position_table": whole,
                "image_tokens": image_tokens,
                "text_tokens": tokens,
                "forward_tflop": forward / 1e12,
                "forward_backward_tflop": both / 1e12,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("preset", "blocks", "width", "heads", "parameters", "with table", "tokens", "TFLOP fwd+bwd")
    for row in rows:
        table.add_row(
            str(row["preset"]),
            f"{row['depth']}+{row['single_depth']}" if row["single_depth"] else str(row["depth"]),
            *(str(row[key]) for key in ("width", "heads")),
            f"{row['parameters']:,}",
            f"{row['parameters_with_position_table']:,}",
            f"{row['image_tokens']}+{row['text_tokens']}",
            f"{row['forward_backward_tflop']:.4g}",
        )
    Console(width=120).print(table)
