"""Shape suffixes: B batch · L text tokens · D width."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from stack.text.conditioning import EncodedText, Pad, collate, join, unconditional

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


def visible(context_BLD: Tensor, mask_BL: Tensor, pooled_BD: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the transformer can see of each caption."""
    return [(c[m], p) for c, m, p in zip(context_BLD, mask_BL, pooled_BD, strict=True)]


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
    context_BLD, mask_BL, pooled_BD = join(collate([encoded, encoded], pad="full"), 4096)
    assert context_BLD.shape == (2, 154, 4096)
    assert pooled_BD.shape == (2, 2048)
    assert mask_BL.dtype == torch.bool
    assert mask_BL.all()
    t5, clip_l, clip_g = embeddings(encoded)
    assert torch.equal(context_BLD[1, :77, :768], clip_l)
    assert torch.equal(context_BLD[1, :77, 768:2048], clip_g)
    assert torch.equal(context_BLD[1, :77, 2048:], torch.zeros(77, 2048))
    assert torch.equal(context_BLD[1, 77:], t5)
    assert torch.equal(pooled_BD[1], encoded.pooled)


def test_captions_of_different_lengths() -> None:
    short, long = caption(2, 3), caption(5, 4, seed=1)
    batch = collate([short, long])
    context_BLD, mask_BL, _ = join(batch, CONTEXT)
    assert context_BLD.shape == (2, 4 + 5, CONTEXT)
    assert mask_BL.int().tolist() == [[1, 1, 1, 0, 1, 1, 0, 0, 0], [1] * 9]
    t5, clip_l, _ = embeddings(short)
    assert torch.equal(context_BLD[0, :3, :CLIP_L], clip_l)
    assert torch.equal(context_BLD[0, 4:6, :T5], t5)
    assert not context_BLD[0][~mask_BL[0]].any()
    alone = visible(*join(collate([short]), CONTEXT))[0]
    assert all(torch.equal(a, b) for a, b in zip(alone, visible(*join(batch, CONTEXT))[0], strict=True))


def test_each_encoder_is_dropped_by_itself() -> None:
    encoded = caption(4, 3)
    batch = collate([encoded] * 8)
    kept = list(itertools.product((True, False), repeat=3))
    keep_t5_B, keep_l_B, keep_g_B = (flags(*column) for column in zip(*kept, strict=True))
    context_BLD, mask_BL, pooled_BD = join(batch, CONTEXT, keep_t5_B, keep_l_B, keep_g_B)
    t5, clip_l, clip_g = embeddings(encoded)
    for row, (has_t5, has_l, has_g) in enumerate(kept):
        assert torch.equal(context_BLD[row, :3, :CLIP_L], clip_l * has_l)
        assert torch.equal(context_BLD[row, :3, CLIP_L : CLIP_L + CLIP_G], clip_g * has_g)
        assert torch.equal(context_BLD[row, 3:, :T5], t5 * has_t5)
        assert torch.equal(pooled_BD[row, :CLIP_L], encoded.pooled[:CLIP_L] * has_l)
        assert torch.equal(pooled_BD[row, CLIP_L:], encoded.pooled[CLIP_L:] * has_g)
        assert mask_BL[row].int().tolist() == [1, 1, int(has_l or has_g), 1, *[int(has_t5)] * 3]


@pytest.mark.parametrize("pad", ["trim", "full"])
def test_unconditional_is_the_same_for_all_captions(pad: Pad) -> None:
    tokens = [(9, 6), (3, 4), (1, 2)] if pad == "trim" else [(9, 7)] * 3
    captions = [caption(*lengths, seed=seed) for seed, lengths in enumerate(tokens)]
    together = visible(*unconditional(collate(captions, pad), CONTEXT))
    apart = [visible(*unconditional(collate([c], pad), CONTEXT))[0] for c in captions]
    for context_LD, pooled_D in together + apart:
        assert context_LD.shape == ((3 if pad == "trim" else 16), CONTEXT)
        assert not context_LD.any()
        assert not pooled_D.any()


def test_full_padding_stays_in_the_mask() -> None:
    batch = collate([caption(6, 7)] * 2, pad="full")
    context_BLD, mask_BL, _ = join(batch, CONTEXT, keep_t5_B=flags(True, False))
    assert mask_BL.all()
    assert not context_BLD[1, 7:].any()
    assert context_BLD[0, 7:, :T5].all()


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
    context_BLD, mask_BL, pooled_BD = join(batch, CONTEXT)
    assert context_BLD.shape == (2, 3 * (clip_l or clip_g) + 4 * t5, CONTEXT)
    assert context_BLD.dtype == torch.float64
    assert mask_BL.all()
    assert torch.equal(pooled_BD[0], encoded.pooled.double())
    _, mask_BL, pooled_BD = unconditional(batch, CONTEXT)
    assert mask_BL[0].sum() == 2 * (clip_l or clip_g) + t5
    assert not pooled_BD.any()


def test_a_dropped_encoder_is_zero_even_where_it_was_infinite() -> None:
    encoded = caption(2, 3)
    infinite = dataclasses.replace(encoded, t5=torch.full((2, T5), torch.inf))
    context_BLD, _, _ = join(collate([infinite]), CONTEXT, keep_t5_B=flags(False))
    assert context_BLD.isfinite().all()


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
