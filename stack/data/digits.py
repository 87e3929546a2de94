"""scikit-learn's 1,797 handwritten digits of 8×8 pixels as shards: labels and grey images without a download."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from stack.config import UserError
from stack.files import publish

LEVELS = 17
"""Of grey: v of 0 … 16 is written as v·255/16, rounded."""
SAMPLES_PER_SHARD = 600


def write_shards(out: Path) -> int:
    """Write NNNNN.tar of KEY.png, KEY.txt and KEY.json ({"label": 3}) into `out`; the number of samples.

    Raises UserError if `out` holds shards already, or scikit-learn is not installed.
    """
    from webdataset import TarWriter

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are scikit-learn's: pip install 'mmdit-stack[digits]'") from None
    if out.exists() and (not out.is_dir() or any(out.glob("*.tar"))):
        raise UserError(f"{out}: holds shards already, or is no folder; choose another for the digits")
    digits = load_digits()
    images, labels = np.round(digits.images * 255 / (LEVELS - 1)).astype(np.uint8), digits.target.tolist()
    for shard, start in enumerate(range(0, len(labels), SAMPLES_PER_SHARD)):
        # mtime=0: the same bytes whenever it is written. The stream is ours because a name would be expanded.
        with (
            publish(out / f"{shard:05d}.tar") as temporary,
            temporary.open("wb") as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,
        ):
            for number in range(start, min(start + SAMPLES_PER_SHARD, len(labels))):
                picture = io.BytesIO()
                Image.fromarray(images[number]).save(picture, "png")
                facts = {"label": labels[number], "caption": f"the digit {labels[number]}"}
                sample = {"txt": facts["caption"].encode(), "json": json.dumps(facts).encode()}
                writer.write({"__key__": f"{number:05d}", "png": picture.getvalue(), **sample})
    return len(labels)
