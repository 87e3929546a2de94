from typing import Any

import pytest
import torch
from torch import Tensor

from stack.flow.guidance import classifier_free, guided
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text.conditioning import Context


def model() -> MMDiT:
    model = MMDiT(MMDiTConfig.from_preset("mmdit-test")).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.requires_grad_(False)


def condition(lengths: list[int], seed: int) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(
        torch.randn(sum(lengths), 32, dtype=torch.float64, generator=generator),
        lengths,
        torch.randn(len(lengths), 32, dtype=torch.float64, generator=generator),
    )


def test_scale_one_is_no_guidance_and_zero_is_unconditional() -> None:
    v_uncond, v_cond = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided(v_uncond, v_cond, 1), v_cond)
    assert torch.equal(guided(v_uncond, v_cond, 0), v_uncond)
    w = 2.5  # the other form in use: (1 + w)·v_y − w·v_∅
    torch.testing.assert_close(guided(v_uncond, v_cond, 1 + w), (1 + w) * v_cond - w * v_uncond)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 3, 2]])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equals_two_calls(lengths: list[int], scale: float) -> None:
    network = model()
    calls = 0

    def counting(*batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return network(*batch)

    latent = torch.randn(3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t_B = torch.tensor([0.2, 0.5, 0.9])
    cond, uncond = condition(lengths, 2), condition([5, 5, 5], 3)
    velocity = classifier_free(counting, latent, t_B, cond, uncond, scale)
    assert calls == 1
    expected = guided(network(latent, t_B, *uncond), network(latent, t_B, *cond), scale)
    torch.testing.assert_close(velocity, expected, rtol=1e-9, atol=1e-9)
