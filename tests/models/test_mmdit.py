"""B batch · C channels · H W height, width · L text tokens · D width"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stack.models.mmdit import JointBlock, MMDiT, MMDiTConfig, Projection
from stack.nn.linear import decay_groups


def randomised(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> MMDiT:
    """A model in which nothing is zero, so that every path shows in the output."""
    model = MMDiT(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def inputs(
    config: MMDiTConfig, size: tuple[int, int] = (8, 12), num_text: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, config.in_channels, *size, dtype=dtype, generator=generator),
        torch.tensor([0.013, 0.5, 1.0]),
        torch.randn(3, num_text, config.context_dim, dtype=dtype, generator=generator),
        torch.randn(3, config.pooled_dim, dtype=dtype, generator=generator),
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def as_diffusers(model: MMDiT) -> dict[str, Tensor]:
    """Our weights under diffusers' names, in its layout."""
    config = model.config
    state = {
        "pos_embed.proj.weight": model.img_in.weight.reshape(config.width, config.in_channels, 2, 2),
        "pos_embed.proj.bias": model.img_in.bias,
    }

    def swap_halves(x: Tensor) -> Tensor:  # (shift, scale) → (scale, shift)
        return torch.cat(x.chunk(2)[::-1])

    def linear(name: str, ours: nn.Module, swapped: bool = False) -> None:
        for key, value in ours.state_dict().items():
            state[f"{name}.{key}"] = swap_halves(value) if swapped else value

    def projection(block: str, ours: Projection, names: tuple[str, str, str], norms: tuple[str, str]) -> None:
        for key in ("weight", "bias"):
            for name, value in zip(names, getattr(ours.linear, key).chunk(3), strict=True):
                state[f"{block}.attn.{name}.{key}"] = value
        if config.qk_norm:
            for name, norm in zip(norms, (ours.norm_q, ours.norm_k), strict=True):
                linear(f"{block}.attn.{name}", norm)

    linear("context_embedder", model.txt_in)
    linear("time_text_embed.timestep_embedder.linear_1", model.time_in.inner)
    linear("time_text_embed.timestep_embedder.linear_2", model.time_in.outer)
    linear("time_text_embed.text_embedder.linear_1", model.pooled_in.inner)
    linear("time_text_embed.text_embedder.linear_2", model.pooled_in.outer)
    linear("norm_out.linear", model.final.modulation.linear, swapped=True)
    linear("proj_out", model.final.linear)
    blocks: list[Any] = [*model.blocks, model.last_block]
    for index, block in enumerate(blocks):
        name = f"transformer_blocks.{index}"
        projection(name, block.img.qkv, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        projection(name, block.txt.qkv, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
        linear(f"{name}.norm1.linear", block.img.modulation.linear)
        linear(f"{name}.attn.to_out.0", block.img.out)
        linear(f"{name}.ff.net.0.proj", block.img.mlp[0])
        linear(f"{name}.ff.net.2", block.img.mlp[2])
        last = block is model.last_block
        linear(f"{name}.norm1_context.linear", block.txt.modulation.linear, swapped=last)
        if not last:
            linear(f"{name}.attn.to_add_out", block.txt.out)
            linear(f"{name}.ff_context.net.0.proj", block.txt.mlp[0])
            linear(f"{name}.ff_context.net.2", block.txt.mlp[2])
    return state


@pytest.mark.parametrize(
    ("qk_norm", "dtype", "tolerance"),
    # diffusers takes the root mean square in float32 even of float64.
    [(False, torch.float64, 1e-10), (True, torch.float64, 1e-6), (True, torch.float32, 1e-5)],
)
def test_equals_diffusers_sd3(qk_norm: bool, dtype: torch.dtype, tolerance: float) -> None:
    from diffusers import SD3Transformer2DModel
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    config = MMDiTConfig.from_preset(
        "mmdit-test", depth=3, qk_norm=qk_norm, position_table_size=32, position_base_size=16
    )
    ours = randomised(config, dtype)
    theirs: Any = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=config.in_channels, out_channels=config.in_channels,
        num_layers=config.depth, attention_head_dim=config.head_size, num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim, caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim, pos_embed_max_size=config.position_table_size,
        qk_norm="rms_norm" if qk_norm else None,
    )  # fmt: skip
    theirs.to(dtype)
    table = get_2d_sincos_pos_embed(config.width, config.position_table_size, base_size=16)  # before its rounding
    theirs.load_state_dict({**as_diffusers(ours), "pos_embed.pos_embed": table[None].to(dtype)})

    latent, t, context, pooled = inputs(config, dtype=dtype)
    with torch.no_grad():
        (expected,) = theirs(latent, context, pooled, 1000 * t, return_dict=False)
        velocity = ours(latent, t, context, pooled)
    assert velocity.shape == latent.shape
    assert relative(velocity, expected) < tolerance


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_padded_and_masked_equals_each_sample_alone(positions: str) -> None:
    config = MMDiTConfig.from_preset("mmdit-test", positions=positions)
    model = randomised(config)
    latent, t, context, pooled = inputs(config)
    lengths = torch.tensor([7, 1, 4])
    mask_BL = torch.arange(7) < lengths[:, None]
    together = model(latent, t, context, pooled, mask_BL)  # the padding holds numbers, which must not matter
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = model(latent[one], t[one], context[one, :length], pooled[one])
        assert relative(together[one], alone) < 1e-5
    assert relative(model(latent, t, context, pooled), together) > 1e-3


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_positions_of_the_image_matter(positions: str) -> None:
    config = MMDiTConfig.from_preset("mmdit-test", positions=positions)
    model = randomised(config)
    latent, t, context, pooled = inputs(config)
    flipped = latent.roll(2, dims=-1)
    assert relative(model(flipped, t, context, pooled).roll(-2, dims=-1), model(latent, t, context, pooled)) > 1e-3


def materialised(config: MMDiTConfig, seed: int) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights(seed)
    return model


def test_init_forgets_no_parameter_and_starts_at_velocity_zero() -> None:
    config = MMDiTConfig.from_preset("mmdit-test")
    model = materialised(config, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not list(model.buffers())
    assert torch.equal(model(*inputs(config)), torch.zeros(3, config.in_channels, 8, 12))

    block = model.blocks[0]
    assert isinstance(block, JointBlock)
    assert not block.img.modulation.linear.weight.any()
    assert not model.final.modulation.linear.weight.any()
    assert model.time_in.inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv = block.txt.qkv.linear.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / sum(qkv.shape)), rel=0.01)
    assert (dict(model.named_parameters())["last_block.img.qkv.norm_q.weight"] == 1).all()


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


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_bfloat16_weights_stay_near_float32(positions: str) -> None:
    config = MMDiTConfig.from_preset("mmdit-test", positions=positions)
    model = randomised(config)
    expected = model(*inputs(config))
    velocity = model.bfloat16()(*inputs(config))
    assert velocity.dtype == torch.bfloat16
    assert relative(velocity.float(), expected) < 0.1
    velocity.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_gradients_reach_everything_that_counts(positions: str) -> None:
    config = MMDiTConfig.from_preset("mmdit-test", depth=1, positions=positions)
    model = randomised(config, torch.float64)
    latent, t, context, pooled = inputs(config, (4, 4), 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: model(x[0], t, x[1], x[2]),
        tuple(x.requires_grad_() for x in (latent, context, pooled)),
        fast_mode=True,
    )
    unread = {"last_block.txt.qkv.norm_q.weight"}  # the last block's text queries lead nowhere
    model(latent, t, context, pooled).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} <= unread


def test_sides_that_do_not_fit_are_named() -> None:
    config = MMDiTConfig.from_preset("mmdit-test")
    model = randomised(config)
    _, t, context, pooled = inputs(config)
    with pytest.raises(ValueError, match="5×8 does not divide into patches of 2×2"):
        model(torch.zeros(3, config.in_channels, 5, 8), t, context, pooled)
    with pytest.raises(ValueError, match=r"17 patches.*table of 16"):
        model(torch.zeros(3, config.in_channels, 34, 8), t, context, pooled)
