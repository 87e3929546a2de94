"""Contact sheets: images in a grid, each with its caption under it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str] | None = None, columns: int = 8, cell: int = 128
) -> Image.Image:
    """A sheet of uint8 [H, W, 3] images, each enlarged to fit a square of `cell` pixels (nearest neighbour)."""
    columns = min(columns, max(len(images), 1))
    rows = -(-len(images) // columns)
    caption_height = 30 if captions is not None else 0
    gap = 6
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + caption_height + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, pixels in enumerate(images):
        left = gap + (i % columns) * (cell + gap)
        top = gap + (i // columns) * (cell + caption_height + gap)
        picture = Image.fromarray(pixels)
        scale = cell / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST)
        sheet.paste(picture, (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
        if captions is not None:
            lines = textwrap.wrap(captions[i], width=cell // 5)[:2]
            pen.multiline_text((left, top + cell + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet
