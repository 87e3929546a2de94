"""Small images with labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source: 64 grey images of one value, dark (label 0) or bright (label 1). paired: bright for dark, and so on.

    No sample has a caption.
    """
    folder = tmp_path_factory.mktemp("labelled")
    for name, values in (("source", (40, 220)), ("paired", (220, 40))):
        (folder / name).mkdir()
        with (folder / name / "00000.tar").open("wb") as stream, TarWriter(stream, encoder=False) as writer:
            for number in range(64):
                picture = io.BytesIO()
                Image.fromarray(np.full((8, 8), values[number % 2], np.uint8)).save(picture, "png")
                facts = json.dumps({"label": number % 2, "number": number}).encode()
                writer.write({"__key__": f"{number:02d}", "png": picture.getvalue(), "json": facts})
    return folder


@pytest.fixture(scope="session")
def labelled_data(labelled: Path) -> dict[str, Any]:
    """The section `data` of a training on them."""
    return {
        "kind": "images",
        "source": str(labelled / "source"),
        "buckets": {"resolution": 8},
        "channels": 1,
        "label": "label",
        "batch_size": 16,
        "validation_share": 0.2,
    }
