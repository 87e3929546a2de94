"""SD3's way of joining text encoders (arXiv 2403.03206), as pure tensor code.

Shape suffixes: B batch · L text tokens of a caption · T of all captions · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pad = Literal["trim", "full"]

# What is left of an empty caption: </s> of T5, <sot><eot> of CLIP.
EMPTY_T5_TOKENS = 1
EMPTY_CLIP_TOKENS = 2


@dataclass(frozen=True)
class EncodedText:
    """One caption. An encoder that is absent leaves None, and nothing in `pooled`; a CLIP of which only the pooled
    vector is wanted leaves no tokens, L_clip = 0."""

    t5: Tensor | None  # [L_t5, D_t5]
    clip_l: Tensor | None  # [L_clip, D_l], second to last layer, without the final LayerNorm
    clip_g: Tensor | None  # [L_clip, D_g], likewise
    pooled: Tensor  # [D_l + D_g], the EOT states of CLIP-L and bigG, projected or not
    cut: dict[str, int] = field(default_factory=dict)
    """Tokens of the whole caption by encoder, of those encoders that read only its beginning; empty if stored."""


@dataclass(frozen=True)
class TextBatch:
    """Captions padded with zeros to the longest of the batch; lengths count true tokens, and stay on the CPU.

    t5_scale_BL: where T5 is kept in float8, what each token is multiplied with; `to` applies it.
    """

    t5_BLD: Tensor | None
    t5_scale_BL: Tensor | None
    t5_length_B: Tensor
    clip_l_BLD: Tensor | None
    clip_g_BLD: Tensor | None
    clip_length_B: Tensor
    pooled_BD: Tensor
    pad: Pad

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextBatch:
        """A copy on `device`; embeddings in `dtype`, float8 becomes `dtype` or float32."""

        def move(embedding: Tensor | None) -> Tensor | None:
            return None if embedding is None else embedding.to(device=device, dtype=dtype, non_blocking=True)

        t5_BLD = move(self.t5_BLD)
        if self.t5_BLD is not None and self.t5_scale_BL is not None:  # crosses to the device in eight bits
            scale_BL = self.t5_scale_BL.to(device)
            t5_BLD = (self.t5_BLD.to(device).float() * scale_BL[..., None]).to(dtype or torch.float32)
        return TextBatch(
            t5_BLD=t5_BLD,
            t5_scale_BL=None,
            t5_length_B=self.t5_length_B,
            clip_l_BLD=move(self.clip_l_BLD),
            clip_g_BLD=move(self.clip_g_BLD),
            clip_length_B=self.clip_length_B,
            pooled_BD=self.pooled_BD.to(device=device, dtype=dtype),
            pad=self.pad,
        )


def collate(captions: Sequence[EncodedText], pad: Pad = "trim") -> TextBatch:
    """Pad `captions` to one batch. `pad` is the form they were encoded in: `join` needs it where it drops."""
    t5_BLD, t5_length_B = _stack([caption.t5 for caption in captions])
    clip_l_BLD, clip_l_length_B = _stack([caption.clip_l for caption in captions])
    clip_g_BLD, clip_g_length_B = _stack([caption.clip_g for caption in captions])
    if clip_l_BLD is not None and clip_g_BLD is not None and not torch.equal(clip_l_length_B, clip_g_length_B):
        raise ValueError(f"CLIP-L has lengths {clip_l_length_B.tolist()}, bigG {clip_g_length_B.tolist()}")
    clip_length_B = clip_l_length_B if clip_l_BLD is not None else clip_g_length_B
    pooled_BD = torch.stack([caption.pooled for caption in captions])
    return TextBatch(t5_BLD, None, t5_length_B, clip_l_BLD, clip_g_BLD, clip_length_B, pooled_BD, pad)


def split(batch: TextBatch) -> list[EncodedText]:
    """The captions of a batch: what `collate` was given."""
    batch = batch.to()  # float8 with its scale becomes float32
    captions = []
    for i, (t5_length, clip_length) in enumerate(zip(batch.t5_length_B, batch.clip_length_B, strict=True)):
        t5, clip_l, clip_g = (
            None if tokens_BLD is None else tokens_BLD[i, :length]
            for tokens_BLD, length in (
                (batch.t5_BLD, t5_length),
                (batch.clip_l_BLD, clip_length),
                (batch.clip_g_BLD, clip_length),
            )
        )
        captions.append(EncodedText(t5, clip_l, clip_g, batch.pooled_BD[i]))
    return captions


def _stack(embeddings: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor]:
    present = [embedding for embedding in embeddings if embedding is not None]
    if not present:
        return None, torch.zeros(len(embeddings), dtype=torch.long)
    if len(present) < len(embeddings):
        raise ValueError(f"an encoder is present in {len(present)} of {len(embeddings)} captions")
    lengths_B = torch.tensor([embedding.shape[0] for embedding in present])
    return torch.nn.utils.rnn.pad_sequence(present, batch_first=True), lengths_B


class Context(NamedTuple):
    """Captions as a text-to-image model takes them: their tokens, one caption after another, without padding."""

    tokens_TD: Tensor
    lengths: list[int]
    """How many of the tokens each caption has."""
    pooled_BD: Tensor

    @staticmethod
    def cat(contexts: Sequence[Context]) -> Context:
        """The captions of all `contexts`, in one batch."""
        tokens, lengths, pooled = zip(*contexts, strict=True)
        return Context(torch.cat(tokens), [length for some in lengths for length in some], torch.cat(pooled))


def join(
    batch: TextBatch,
    context_dim: int,
    keep_t5_B: Tensor | None = None,
    keep_clip_l_B: Tensor | None = None,
    keep_clip_g_B: Tensor | None = None,
) -> Context:
    """The real tokens of each caption and its pooled vector.

    A caption's tokens are (CLIP-L ‖ bigG by channel), zero-padded to `context_dim`, followed by T5, zero-padded
    likewise. `keep_*_B` are booleans on the CPU (None: keep all); what is dropped is zeroed (SD3: each with p = .464,
    independently). A dropped caption must not show through its length: of T5 one token stays, of CLIP with both
    encoders dropped two, as of an empty caption. Under `pad: full` all tokens stay, as in SD3. CLIPs without tokens
    add nothing to the context.

    Raises ValueError where the widths don't fit.
    """
    everyone_B = torch.ones(len(batch.pooled_BD), dtype=torch.bool)
    keep_t5_B, keep_clip_l_B, keep_clip_g_B = (
        everyone_B if keep_B is None else keep_B for keep_B in (keep_t5_B, keep_clip_l_B, keep_clip_g_B)
    )
    contexts, reals, pooled_BD = [], [], batch.pooled_BD

    both = ((batch.clip_l_BLD, keep_clip_l_B), (batch.clip_g_BLD, keep_clip_g_B))
    clips = [(clip_BLD, keep_B) for clip_BLD, keep_B in both if clip_BLD is not None]
    dims = [clip_BLD.shape[-1] for clip_BLD, _ in clips]
    if sum(dims) != pooled_BD.shape[-1]:
        raise ValueError(f"the pooled vector has {pooled_BD.shape[-1]} channels, the CLIP encoders have {sum(dims)}")
    if clips:
        clip_BLD = torch.cat([_drop(clip_BLD, keep_B) for clip_BLD, keep_B in clips], dim=-1)
        keep_clip_B = torch.stack([keep_B for _, keep_B in clips]).any(dim=0)
        if clip_BLD.shape[1]:
            contexts.append(_widen(clip_BLD, context_dim))
            reals.append(_real(batch.clip_length_B, keep_clip_B, EMPTY_CLIP_TOKENS, clip_BLD.shape[1], batch.pad))
        parts = zip(pooled_BD.split(dims, dim=-1), clips, strict=True)
        pooled_BD = torch.cat([_drop(part_BD, keep_B) for part_BD, (_, keep_B) in parts], dim=-1)
    if batch.t5_BLD is not None:
        contexts.append(_widen(_drop(batch.t5_BLD, keep_t5_B), context_dim))
        reals.append(_real(batch.t5_length_B, keep_t5_B, EMPTY_T5_TOKENS, batch.t5_BLD.shape[1], batch.pad))
    if not contexts:
        raise ValueError("no text encoder is present: there is nothing to join")
    context_BLD, real_BL = torch.cat(contexts, dim=1), torch.cat(reals, dim=1)
    place_T = real_BL.flatten().nonzero()[:, 0].to(context_BLD.device, non_blocking=True)
    return Context(context_BLD.flatten(0, 1)[place_T], real_BL.sum(1).tolist(), pooled_BD)


def unconditional(batch: TextBatch, context_dim: int) -> Context:
    """`join` with every encoder dropped: the other half of classifier-free guidance, the same for all captions."""
    nobody_B = torch.zeros(len(batch.pooled_BD), dtype=torch.bool)
    return join(batch, context_dim, nobody_B, nobody_B, nobody_B)


def _drop(embedding: Tensor, keep_B: Tensor) -> Tensor:
    keep = keep_B.to(embedding.device, non_blocking=True).view(-1, *[1] * (embedding.ndim - 1))
    return embedding.masked_fill(~keep, 0.0)


def _widen(embedding_BLD: Tensor, context_dim: int) -> Tensor:
    if embedding_BLD.shape[-1] > context_dim:
        raise ValueError(f"context_dim is {context_dim}, the text encoders give {embedding_BLD.shape[-1]} channels")
    return torch.nn.functional.pad(embedding_BLD, (0, context_dim - embedding_BLD.shape[-1]))


def _real(length_B: Tensor, keep_B: Tensor, num_if_dropped: int, num_tokens: int, pad: Pad) -> Tensor:
    """Which of a caption's tokens the model sees, on the CPU."""
    if pad == "trim":
        length_B = torch.where(keep_B, length_B, num_if_dropped)
    return torch.arange(num_tokens) < length_B[:, None]
