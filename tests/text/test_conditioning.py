"""Shape suffixes: B batch · L text tokens · D width."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from stack.text.conditioning import Context, EncodedText, Pad, collate, join, unconditional

T5, CLIP_L, CLIP_G, CONTEXT = 10, 3, 5, 12  # channels


def caption(t5_tokens: int, clip_tokens: int, seed: int = 0) -> EncodedText:
    g = torch.Generator().manual_seed(seed)
    return EncodedText(
        t5=torch.randn(t5_tokens, T5, generator=g),
        clip_l=torch.randn(clip_tokens, CLIP_L, generator=g),
        clip_g=torch.randn(clip_tokens, CLIP_G, generator=g),
        pooled=torch.randn(CLIP_L + CLIP_G, generator=g),
    )


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)


def captions_of(context: Context) -> list[tuple[Tensor, Tensor]]:
    """Tokens [L, D] and pooled vector [D] of each caption."""
    return list(zip(context.tokens_TD.split(context.lengths), context.pooled_BD, strict=True))


def embeddings(encoded: EncodedText) -> tuple[Tensor, Tensor, Tensor]:
    assert encoded.t5 is not None
    assert encoded.clip_l is not None
    assert encoded.clip_g is not None
    return encoded.t5, encoded.clip_l, encoded.clip_g


def test_sd3_widths_and_places() -> None:
    g = torch.Generator().manual_seed(0)
    encoded = EncodedText(
        t5=torch.randn(77, 4096, generator=g),
        clip_l=torch.randn(77, 768, generator=g),
        clip_g=torch.randn(77, 1280, generator=g),
        pooled=torch.randn(2048, generator=g),
    )
    context = join(collate([encoded, encoded], pad="full"), 4096)
    assert context.tokens_TD.shape == (2 * 154, 4096)
    assert context.pooled_BD.shape == (2, 2048)
    assert context.lengths == [154, 154]
    tokens_LD, pooled_D = captions_of(context)[1]
    t5, clip_l, clip_g = embeddings(encoded)
    assert torch.equal(tokens_LD[:77, :768], clip_l)
    assert torch.equal(tokens_LD[:77, 768:2048], clip_g)
    assert torch.equal(tokens_LD[:77, 2048:], torch.zeros(77, 2048))
    assert torch.equal(tokens_LD[77:], t5)
    assert torch.equal(pooled_D, encoded.pooled)


def test_captions_of_different_lengths() -> None:
    short, long = caption(2, 3), caption(5, 4, seed=1)
    batch = collate([short, long])
    context = join(batch, CONTEXT)
    assert context.lengths == [3 + 2, 4 + 5]
    assert context.tokens_TD.shape == (5 + 9, CONTEXT)
    t5, clip_l, _ = embeddings(short)
    tokens_LD, _ = captions_of(context)[0]
    assert torch.equal(tokens_LD[:3, :CLIP_L], clip_l)
    assert torch.equal(tokens_LD[3:, :T5], t5)
    for row, encoded in enumerate((short, long)):
        alone = captions_of(join(collate([encoded]), CONTEXT))[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, captions_of(context)[row], strict=True))


def test_each_encoder_is_dropped_by_itself() -> None:
    encoded = caption(4, 3)
    batch = collate([encoded] * 8)
    kept = list(itertools.product((True, False), repeat=3))
    keep_t5_B, keep_l_B, keep_g_B = (flags(*column) for column in zip(*kept, strict=True))
    rows = captions_of(join(batch, CONTEXT, keep_t5_B, keep_l_B, keep_g_B))
    t5, clip_l, clip_g = embeddings(encoded)
    for row, (has_t5, has_l, has_g) in enumerate(kept):
        tokens_LD, pooled_D = rows[row]
        num_clip, num_t5 = 3 if has_l or has_g else 2, 4 if has_t5 else 1  # as many as an empty caption has
        assert tokens_LD.shape == (num_clip + num_t5, CONTEXT)
        assert torch.equal(tokens_LD[:num_clip, :CLIP_L], clip_l[:num_clip] * has_l)
        assert torch.equal(tokens_LD[:num_clip, CLIP_L : CLIP_L + CLIP_G], clip_g[:num_clip] * has_g)
        assert torch.equal(tokens_LD[num_clip:, :T5], t5[:num_t5] * has_t5)
        assert torch.equal(pooled_D[:CLIP_L], encoded.pooled[:CLIP_L] * has_l)
        assert torch.equal(pooled_D[CLIP_L:], encoded.pooled[CLIP_L:] * has_g)


@pytest.mark.parametrize("pad", ["trim", "full"])
def test_unconditional_is_the_same_for_all_captions(pad: Pad) -> None:
    tokens = [(9, 6), (3, 4), (1, 2)] if pad == "trim" else [(9, 7)] * 3
    captions = [caption(*lengths, seed=seed) for seed, lengths in enumerate(tokens)]
    together = captions_of(unconditional(collate(captions, pad), CONTEXT))
    apart = [captions_of(unconditional(collate([c], pad), CONTEXT))[0] for c in captions]
    for context_LD, pooled_D in together + apart:
        assert context_LD.shape == ((3 if pad == "trim" else 16), CONTEXT)
        assert not context_LD.any()
        assert not pooled_D.any()


def test_full_padding_stays() -> None:
    batch = collate([caption(6, 7)] * 2, pad="full")
    context = join(batch, CONTEXT, keep_t5_B=flags(True, False))
    assert context.lengths == [13, 13]
    (kept_LD, _), (dropped_LD, _) = captions_of(context)
    assert not dropped_LD[7:].any()
    assert kept_LD[7:, :T5].all()


@pytest.mark.parametrize("present", [p for p in itertools.product((True, False), repeat=3) if any(p)])
def test_absent_encoders(present: tuple[bool, bool, bool]) -> None:
    t5, clip_l, clip_g = present
    whole = caption(4, 3)
    parts = [whole.pooled[:CLIP_L]] * clip_l + [whole.pooled[CLIP_L:]] * clip_g
    encoded = EncodedText(
        t5=whole.t5 if t5 else None,
        clip_l=whole.clip_l if clip_l else None,
        clip_g=whole.clip_g if clip_g else None,
        pooled=torch.cat(parts) if parts else torch.empty(0),
    )
    batch = collate([encoded, encoded]).to("cpu", torch.float64)
    context = join(batch, CONTEXT)
    assert context.lengths == [3 * (clip_l or clip_g) + 4 * t5] * 2
    assert context.tokens_TD.shape == (sum(context.lengths), CONTEXT)
    assert context.tokens_TD.dtype == torch.float64
    assert torch.equal(context.pooled_BD[0], encoded.pooled.double())
    nothing = unconditional(batch, CONTEXT)
    assert nothing.lengths == [2 * (clip_l or clip_g) + t5] * 2
    assert not nothing.pooled_BD.any()


def test_a_dropped_encoder_is_zero_even_where_it_was_infinite() -> None:
    encoded = caption(2, 3)
    infinite = dataclasses.replace(encoded, t5=torch.full((2, T5), torch.inf))
    assert join(collate([infinite]), CONTEXT, keep_t5_B=flags(False)).tokens_TD.isfinite().all()


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="context_dim is 9, the text encoders give 10 channels"):
        join(collate([caption(2, 3)]), 9)
    wrong = dataclasses.replace(caption(2, 3), pooled=torch.zeros(7))
    with pytest.raises(ValueError, match="pooled vector has 7 channels, the CLIP encoders have 8"):
        join(collate([wrong]), CONTEXT)
    with pytest.raises(ValueError, match="an encoder is present in 1 of 2 captions"):
        collate([caption(2, 3), dataclasses.replace(caption(2, 3), t5=None)])
    uneven = dataclasses.replace(caption(2, 3), clip_g=torch.zeros(4, CLIP_G))
    with pytest.raises(ValueError, match=r"CLIP-L has lengths \[3\], bigG \[4\]"):
        collate([uneven])
