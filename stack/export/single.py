"""One .safetensors in the authors' names, with Stability AI's ModelSpec 1.0.1 in its header: what ComfyUI reads."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path

import torch

from stack.export import card
from stack.export.card import Subject
from stack.models import convert
from stack.models.mmdit import MMDiTConfig

ARCHITECTURES = {
    "sd3-medium": "stable-diffusion-v3-medium",
    "sd3.5-medium": "stable-diffusion-v3.5-medium",
    "sd3.5-large": "stable-diffusion-v3.5-large",
    "flux-dev": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
}
IMPLEMENTATIONS = {"sd3": "https://github.com/Stability-AI/sd3.5", "flux": "https://github.com/black-forest-labs/flux"}
_NO_HASH = "0x" + 64 * "0"


def write(subject: Subject, path: Path, dtype: torch.dtype) -> None:
    """Raises UserError where the authors' format cannot hold this network."""
    created = datetime.fromtimestamp(subject.snap.path.stat().st_mtime, timezone.utc)
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture(subject),
        "implementation": IMPLEMENTATIONS[subject.family],
        "title": f"{subject.name}, step {subject.snap.step}",
        "description": f"{card.summary(subject)} {card.captions(subject)}",
        "date": created.isoformat(timespec="seconds"),
        "resolution": "{}x{}".format(*subject.size),
        "prediction_type": "rectified-flow",
        "hash_sha256": _NO_HASH,
    }
    metadata = {f"modelspec.{key}": value for key, value in spec.items()}
    convert.save(subject.network, path, "original", dtype, metadata)
    _write_hash(path)


def architecture(subject: Subject) -> str:
    """The published model's name where the network is one's, else an own one that tells the sizes."""
    config = subject.network.config
    for preset, name in ARCHITECTURES.items():
        if _sizes(MMDiTConfig.from_preset(preset)) == _sizes(config):
            return name
    single = f"-s{config.single_depth}" if config.single_depth else ""
    return f"mmdit-{subject.family}-d{config.depth}{single}-w{config.width}"


def _sizes(config: MMDiTConfig) -> dict[str, object]:
    return config.model_dump(exclude={"preset"})


def _write_hash(path: Path) -> None:
    """In place of the placeholder, of the same length: the sha256 of all after the header."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        place = 8 + file.read(length).index(_NO_HASH.encode())
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        file.seek(place)
        file.write(f"0x{digest.hexdigest()}".encode())
