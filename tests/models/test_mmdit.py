"""B batch · C channels · H W height, width · L text tokens · D width"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stack.config import UserError
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.nn.embed import sincos_positions
from stack.nn.kernels import gated_residual, modulated_norm, norm_rotate
from stack.nn.linear import decay_groups

PRESETS = ("mmdit-test", "flux-test")
GUIDED = {"guidance_embedding": True}


def randomised(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> MMDiT:
    """A model in which nothing is zero, so that every path shows in the output."""
    model = MMDiT(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


class Inputs(NamedTuple):
    latent_BCHW: Tensor
    t_B: Tensor
    context_TD: Tensor
    lengths: list[int]
    pooled_BD: Tensor


def inputs(
    config: MMDiTConfig,
    size: tuple[int, int] = (8, 12),
    lengths: Sequence[int] = (7, 1, 4),
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return Inputs(
        torch.randn(3, config.in_channels, *size, dtype=dtype, generator=generator),
        torch.tensor([0.013, 0.5, 1.0]),
        torch.randn(sum(lengths), config.context_dim, dtype=dtype, generator=generator),
        list(lengths),
        torch.randn(3, config.pooled_dim, dtype=dtype, generator=generator),
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_does_not_depend_on_the_others(preset: str) -> None:
    config = MMDiTConfig.from_preset(preset)
    model = randomised(config)
    batch = inputs(config)
    together = model(*batch)
    captions = batch.context_TD.split(batch.lengths)
    for i, length in enumerate(batch.lengths):
        one = slice(i, i + 1)
        alone = model(batch.latent_BCHW[one], batch.t_B[one], captions[i], [length], batch.pooled_BD[one])
        assert relative(together[one], alone) < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_positions_of_the_image_matter(preset: str) -> None:
    config = MMDiTConfig.from_preset(preset)
    model = randomised(config)
    batch = inputs(config)
    flipped = batch._replace(latent_BCHW=batch.latent_BCHW.roll(2, dims=-1))
    assert relative(model(*flipped).roll(-2, dims=-1), model(*batch)) > 1e-3


def test_the_origin_of_positions_matters() -> None:
    """SD3 §5.3.2: by it a crop at the table's centre has the coordinates that pre-training gave its pixels."""
    config = MMDiTConfig.from_preset("mmdit-test")
    moved = MMDiTConfig.from_preset("mmdit-test", position_origin=-6.0)
    table, moved_table = (MMDiT(c)._position_table(4, 4) for c in (config, moved))
    # The table's centre begins with patch 6 of 16, a unit apart: moved by 6, it has the coordinates 0 … 3.
    corner = sincos_positions(*(torch.arange(4.0, dtype=torch.float64),) * 2, config.width)
    torch.testing.assert_close(moved_table, corner)
    assert relative(table, moved_table) > 0.1


def test_image_tokens_attend_among_themselves_where_asked() -> None:
    config = MMDiTConfig.from_preset("mmdit-test", depth=3, image_attention=2)
    model = randomised(config)
    assert [block.img.image_attention is not None for block in model.blocks] == [True, True, False]
    batch = inputs(config)
    velocity = model(*batch)
    torch.nn.init.zeros_(model.blocks[1].img.image_attention.out.weight)
    assert relative(model(*batch), velocity) > 1e-3


def test_guidance_is_an_input_where_the_model_was_distilled_from_it() -> None:
    config = MMDiTConfig.from_preset("flux-test", guidance_embedding=True)
    model, batch = randomised(config), inputs(config)
    low, high = (model(*batch, torch.full((3,), scale)) for scale in (1.0, 3.5))
    assert relative(low, high) > 1e-3
    with pytest.raises(ValueError, match="guidance_embedding=True needs a guidance"):
        model(*batch)
    with pytest.raises(ValueError, match="guidance_embedding=False does not take a guidance"):
        randomised(MMDiTConfig.from_preset("flux-test"))(*batch, torch.ones(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_both_forms_of_the_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all places that a block calls them from, with captions of different lengths in a row."""
    pytest.importorskip("triton")
    config = MMDiTConfig.from_preset("flux-test", depth=1, single_depth=1)
    model, batch = randomised(config, torch.float64), inputs(config, (4, 4), (2, 1, 1), torch.float64)
    results = []
    for fused in (False, True):
        for module in (gated_residual, modulated_norm, norm_rotate):
            monkeypatch.setattr(module, "runs_fused", lambda x, fused=fused: fused)
        velocity = model(*batch)
        results.append([velocity, *torch.autograd.grad(velocity.square().sum(), list(model.parameters()))])
    assert all(relative(triton, plain) < 1e-12 for plain, triton in zip(*results, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_backends_of_attention_agree(preset: str) -> None:
    config = MMDiTConfig.from_preset(preset)
    model, batch = randomised(config, torch.float64), inputs(config, dtype=torch.float64)
    model.attention = "reference"
    expected = model(*batch)
    for backend in ("sdpa", "varlen"):
        model.attention = backend
        assert relative(model(*batch), expected) < 1e-12
    model.attention = "xformers"
    with pytest.raises(UserError, match="needs a GPU"):
        model(*batch)


def materialised(config: MMDiTConfig, seed: int) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights(seed)
    return model


@pytest.mark.parametrize(("preset", "keys"), [("mmdit-test", {"image_attention": 1}), ("flux-test", GUIDED)])
def test_init_forgets_no_parameter_and_starts_at_velocity_zero(preset: str, keys: dict[str, Any]) -> None:
    config = MMDiTConfig.from_preset(preset, **keys)
    model = materialised(config, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not list(model.buffers())
    guidance = (torch.ones(3),) if config.guidance_embedding else ()
    assert torch.equal(model(*inputs(config), *guidance), torch.zeros(3, config.in_channels, 8, 12))

    block = model.blocks[0]
    assert not block.img.modulation.weight.any()
    assert not model.final.modulation.weight.any()
    assert model.time_in.inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv = block.txt.qkv.linear.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / sum(qkv.shape)), rel=0.01)
    assert (block.img.qkv.heads.norm_q.weight == 1).all()


def test_init_is_a_function_of_the_seed() -> None:
    config = MMDiTConfig.from_preset("mmdit-test")
    one, same, other = (dict(materialised(config, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["img_in.weight"], other["img_in.weight"])


def test_only_matrices_take_weight_decay() -> None:
    model = MMDiT(MMDiTConfig.from_preset("mmdit-test"))
    decay, rest = decay_groups(model)
    assert {name for name, p in model.named_parameters() if p.ndim == 2} == {name for name, _ in decay}
    assert len(decay) + len(rest) == len(list(model.parameters()))


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_weights_stay_near_float32(preset: str) -> None:
    config = MMDiTConfig.from_preset(preset)
    model = randomised(config)
    expected = model(*inputs(config))
    velocity = model.bfloat16()(*inputs(config))
    assert velocity.dtype == torch.bfloat16
    assert relative(velocity.float(), expected) < 0.1
    velocity.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 1, 2)])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_everything_that_counts(preset: str, lengths: tuple[int, ...]) -> None:
    config = MMDiTConfig.from_preset(preset, depth=1, **({"single_depth": 1} if preset == "flux-test" else {}))
    model = randomised(config, torch.float64)
    batch = inputs(config, (4, 4), lengths, torch.float64)
    assert torch.autograd.gradcheck(
        lambda latent, context, pooled: model(latent, batch.t_B, context, batch.lengths, pooled),
        tuple(x.requires_grad_() for x in (batch.latent_BCHW, batch.context_TD, batch.pooled_BD)),
        fast_mode=True,
    )
    unread = {"blocks.0.txt.qkv.heads.norm_q.weight"}  # the last text's queries lead nowhere
    model(*batch).square().sum().backward()
    forgotten = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert forgotten == (unread if preset == "mmdit-test" else set())


def test_sides_that_do_not_fit_are_named() -> None:
    config = MMDiTConfig.from_preset("mmdit-test")
    model = randomised(config)
    batch = inputs(config)
    with pytest.raises(ValueError, match="5×8 does not divide into patches of 2×2"):
        model(*batch._replace(latent_BCHW=torch.zeros(3, config.in_channels, 5, 8)))
    with pytest.raises(ValueError, match=r"17 patches.*table of 16"):
        model(*batch._replace(latent_BCHW=torch.zeros(3, config.in_channels, 34, 8)))
