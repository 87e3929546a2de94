"""MLPerf Training's pre-encoded data for FLUX.1 (v5.1), as a source: KEY.json and four members of raw bfloat16.

.mean.bytes and .logvar.bytes hold the latent's moments [16, s, s], .t5.bytes T5-XXL's embeddings [L, 4096], padded and
encoded without a mask, .clip.bytes CLIP-L's pooled vector [768], not projected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stack.data.safety import DecodeError

if TYPE_CHECKING:
    from torch import Tensor

    from stack.data.schema import EncodedSample

EXTENSIONS = ("mean.bytes", "logvar.bytes", "t5.bytes", "clip.bytes")
CHANNELS, T5_DIM, CLIP_DIM = 16, 4096, 768
FACTOR = 8  # pixels of a side to one position of the latent


def measure(sizes: dict[str, int]) -> tuple[int, int]:
    """(side of the latent, T5 tokens) told by the members' bytes. Raises DecodeError where they are not MLPerf's."""
    mean, logvar, t5, clip = (sizes.get(extension, -1) for extension in EXTENSIONS)
    side, tokens = math.isqrt(max(mean, 0) // (2 * CHANNELS)), t5 // (2 * T5_DIM)
    expected = (2 * CHANNELS * side**2, 2 * CHANNELS * side**2, 2 * T5_DIM * tokens, 2 * CLIP_DIM)
    if (mean, logvar, t5, clip) != expected or not side or not tokens:
        found = ", ".join(f".{name} {sizes.get(name, 'missing')}" for name in EXTENSIONS)
        raise DecodeError(f"not MLPerf's layout: bytes of {found}")
    return side, tokens


def decode(members: dict[str, bytes]) -> EncodedSample:
    """The sample told by its four members. Raises DecodeError."""
    import torch

    from stack.data.schema import EncodedSample
    from stack.text.conditioning import EncodedText

    side, tokens = measure({extension: len(data) for extension, data in members.items()})

    def tensor(extension: str, *shape: int) -> Tensor:
        return torch.frombuffer(bytearray(members[extension]), dtype=torch.bfloat16).view(shape)

    latent = (CHANNELS, side, side)
    pooled = tensor("clip.bytes", CLIP_DIM)
    text = EncodedText(tensor("t5.bytes", tokens, T5_DIM), pooled.new_empty(0, CLIP_DIM), None, pooled)
    return EncodedSample(tensor("mean.bytes", *latent), tensor("logvar.bytes", *latent), [text])
