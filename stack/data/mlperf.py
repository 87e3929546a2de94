"""MLPerf Training's pre-encoded data for FLUX.1 (v5.1), as a source: KEY.json and four members of raw bfloat16.

.mean.bytes and .logvar.bytes hold the latent's moments [16, s, s], .t5.bytes T5-XXL's embeddings [256, 4096], padded
and encoded without a mask, .clip.bytes CLIP-L's pooled vector [768], not projected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stack.data.safety import DecodeError

if TYPE_CHECKING:
    from torch import Tensor

    from stack.data.schema import EncodedSample

EXTENSIONS = ("mean.bytes", "logvar.bytes", "t5.bytes", "clip.bytes")
CHANNELS, TOKENS, T5_DIM, CLIP_DIM = 16, 256, 4096, 768
FACTOR = 8  # pixels of a side to one position of the latent
_MAX_LOGVAR = 88.0  # above it a variance is no float32


def measure(sizes: dict[str, int]) -> int:
    """Side of the latent, told by the members' bytes. Raises DecodeError where they are not MLPerf's."""
    mean, logvar, t5, clip = (sizes.get(extension, -1) for extension in EXTENSIONS)
    side = math.isqrt(max(mean, 0) // (2 * CHANNELS))
    latent = 2 * CHANNELS * side**2
    if (mean, logvar, t5, clip) != (latent, latent, 2 * TOKENS * T5_DIM, 2 * CLIP_DIM) or not side:
        found = ", ".join(f".{name} {sizes.get(name, 'missing')}" for name in EXTENSIONS)
        raise DecodeError(f"not MLPerf's layout: bytes of {found}")
    return side


def decode(members: dict[str, bytes]) -> EncodedSample:
    """The sample told by its four members. Raises DecodeError."""
    import torch

    from stack.data.schema import EncodedSample
    from stack.text.conditioning import EncodedText

    side = measure({extension: len(data) for extension, data in members.items()})

    def tensor(extension: str, *shape: int) -> Tensor:
        return torch.frombuffer(bytearray(members[extension]), dtype=torch.bfloat16).view(shape)

    mean, logvar = (tensor(extension, CHANNELS, side, side) for extension in EXTENSIONS[:2])
    if logvar.max() > _MAX_LOGVAR:
        raise DecodeError(f"variance too large: .logvar.bytes has e^{logvar.max():g}")
    pooled = tensor("clip.bytes", CLIP_DIM)
    text = EncodedText(tensor("t5.bytes", TOKENS, T5_DIM), pooled.new_empty(0, CLIP_DIM), None, pooled)
    return EncodedSample(mean, logvar, [text])
