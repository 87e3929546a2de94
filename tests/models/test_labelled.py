"""DiT and U-Net behind one call, and the classifier of noisy images."""

from __future__ import annotations

import pydantic
import pytest
import torch
from safetensors.torch import load, save

from stack.config import UserError
from stack.models.classifier import ClassifierNetworkConfig, NoisyClassifier
from stack.models.dit import DiT, DiTConfig
from stack.models.labelled import LabelNetwork, build
from stack.models.unet import TextUNet, UNet, UNetConfig

DIT = DiTConfig(depth=2, width=32, num_heads=2)
UNET = UNetConfig(block_out_channels=(8, 16), attention=(False, True), layers_per_block=1, num_heads=2, context_dim=16,
                  norm_groups=4)  # fmt: skip
CONFIGS = [pytest.param(DIT, id="dit"), pytest.param(UNET, id="unet")]
CLASSIFIER = ClassifierNetworkConfig(block_out_channels=(8, 16), norm_groups=4, head_size=8)


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that are nowhere zero, so that everything has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return network.eval()


def network(config: DiTConfig | UNetConfig) -> LabelNetwork:
    made = build(config, 1, [(8, 8)], 10, seed=0)
    filled(made)
    return made


def inputs(batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 1, 8, 8, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch_size), torch.arange(batch_size)


@pytest.mark.parametrize("config", CONFIGS)
def test_time_label_and_its_absence_have_an_effect(config):
    made, (x, t, label) = network(config), inputs()
    with torch.inference_mode():
        y = made(x, t, label)
        others = [made(x, t, label + 1), made(x, t, torch.full_like(label, 10)), made(x, t + 1e-4, label)]
    assert y.shape == x.shape
    assert all(not torch.equal(y, other) for other in others)  # 1e-4: times are not rounded to a thousandth


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sample_is_the_same_in_any_batch_and_in_training(config):
    """diffusers' DiT drops labels by torch's generator while it is trained, its own way of guidance."""
    made, (x, t, label) = network(config).double(), inputs(8)
    y = made(x.double(), t, label)
    for _ in range(20):
        assert torch.equal(y, made.train()(x.double(), t, label))
    alone = torch.cat([made(x[i : i + 1].double(), t[i : i + 1], label[i : i + 1]) for i in range(8)])
    assert torch.allclose(y, alone, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_new_network_says_zero_and_is_a_function_of_the_seed(config):
    torch.manual_seed(3)
    one = build(config, 1, [(8, 8)], 10, seed=0)
    torch.manual_seed(4)
    again, other = build(config, 1, [(8, 8)], 10, seed=0), build(config, 1, [(8, 8)], 10, seed=1)
    assert not one(*inputs()).any()
    pairs = list(zip(one.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_go_through_safetensors(config):
    made, (x, t, label) = network(config), inputs()
    weights = load(save({name: p.detach() for name, p in made.named_parameters()}))
    read = build(config, 1, [(8, 8)], 10, seed=5)
    read.load_state_dict(weights)
    assert torch.equal(made(x, t, label), read.eval()(x, t, label))


@pytest.mark.parametrize("config", CONFIGS)
def test_half_precision(config):
    made, (x, t, label) = network(config), inputs()
    with torch.inference_mode():
        exact, half = made(x, t, label), made.bfloat16()(x, t, label)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(("preset", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_dit_has_the_papers_parameters(preset, millions):
    """Table 1 of arXiv 2212.09748, /2 on latents of 32², 1000 classes; its last layer says a variance, too."""
    with torch.device("meta"):
        made = DiT(DiTConfig(preset=preset), 4, 32, 1000)
    sigma = (made.config.width + 1) * made.config.patch_size**2 * 4
    assert round((sum(p.numel() for p in made.parameters()) + sigma) / 1e6) == millions


def test_dit_xl_is_the_authors_to_the_parameter():
    """Their count holds the position table, 256 patches of 1152."""
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(DiTConfig(preset="xl"), 4, 32, 1000).parameters())
    assert count + (1152 + 1) * 16 + 256 * 1152 == 675_129_632


def test_the_unet_is_stable_diffusions():
    with torch.device("meta"):
        made = UNet(UNetConfig(), 4, 0)
    assert sum(p.numel() for name, p in made.named_parameters() if name != "label_in.weight") == 859_520_964


def test_keys_win_over_a_preset():
    config = DiTConfig(preset="s", depth=2)
    assert (config.depth, config.width, config.num_heads) == (2, 384, 6)
    assert DiTConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        (DiTConfig, {"depth": 1, "width": 30, "num_heads": 4}, "width 30 is not divisible by num_heads 4"),
        (DiTConfig, {"depth": 1, "width": 6, "num_heads": 2}, "need a width divisible by 4, got 6"),
        (UNetConfig, {"attention": (True,)}, "attention has 1 values, block_out_channels 4"),
        (UNetConfig, {"block_out_channels": (40,), "attention": (True,)}, "40 must be a multiple of norm_groups 32"),
        (ClassifierNetworkConfig, {"block_out_channels": (12,)}, "12 is not a multiple of norm_groups 8"),
        (ClassifierNetworkConfig, {"block_out_channels": (40,)}, "40, not a multiple of head_size 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(schema, values, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        schema(**values)


def test_images_that_a_dit_does_not_take():
    with pytest.raises(UserError, match=r"images of 9×9 do not divide into objective\.model\.patch_size=2"):
        build(DIT, 1, [(9, 9)], 10, seed=0)
    with pytest.raises(UserError, match=r"squares of one size, and data\.buckets makes them 8×8, 16×8"):
        build(DIT, 1, [(8, 8), (16, 8)], 10, seed=0)


def test_a_unet_takes_any_sides():
    made = build(UNET, 3, [(24, 40)], 0, seed=0)
    for height, width in ((8, 8), (9, 7), (40, 24)):
        assert made(torch.zeros(1, 3, height, width), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (
            1, 3, height, width,
        )  # fmt: skip


def test_a_unet_reads_each_samples_own_text_and_no_padding():
    made = filled(TextUNet(UNET, 4)).double()
    generator = torch.Generator().manual_seed(0)
    latent, context = (torch.randn(*shape, generator=generator).double() for shape in ((3, 4, 8, 8), (9, 16)))
    t, lengths = torch.tensor([0.2, 0.5, 0.8]), [2, 6, 1]
    y = made(latent, t, context, lengths, None, None)
    for i, own in enumerate(context.split(lengths)):
        alone = made(latent[i : i + 1], t[i : i + 1], own, [lengths[i]], None, None)
        assert torch.allclose(y[i : i + 1], alone, atol=1e-10)
    other = torch.cat([context[:2], context[2:8].flip(1), context[8:]])
    changed = (made(latent, t, other, lengths, None, None) - y).flatten(1).abs().amax(1)
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() < 1e-10


def test_a_new_classifier_knows_nothing_and_a_gradient_leads_on():
    made = NoisyClassifier(CLASSIFIER, 1, 10)
    x, t, _ = inputs()
    assert torch.allclose(made(x, t).exp(), torch.tensor(0.1))
    filled(made)
    x.requires_grad_()
    log_p = made(x, t)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(3))
    (gradient,) = torch.autograd.grad(log_p[torch.arange(3), torch.arange(3)].sum(), x)
    assert gradient.abs().flatten(1).sum(1).min() > 0
    assert not torch.equal(log_p, made(x, t + 1e-4))
