import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stack.models.flops import flops_per_sample
from stack.models.mmdit import MMDiT, MMDiTConfig


def counted(config: MMDiTConfig, side: int, num_text: int, device: str) -> tuple[int, int]:
    """What PyTorch counts, per sample. The plain attention kernel, since fused ones recompute in the backward pass."""
    with torch.device(device):
        model = MMDiT(config)
        batch = (
            torch.empty(2, config.in_channels, side, side),
            torch.empty(2),
            torch.empty(2, num_text, config.context_dim),
            torch.empty(2, config.pooled_dim),
        )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(*batch).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward // 2, counter.get_total_flops() // 2


@pytest.mark.parametrize("keys", [{}, {"depth": 1}, {"mlp_ratio": 2}, {"patch_size": 1, "positions": "rope"}])
def test_closed_form_is_exact(keys: dict[str, object]) -> None:
    config = MMDiTConfig.from_preset("mmdit-test", **keys)
    num_image = (8 // config.patch_size) ** 2
    assert flops_per_sample(config, num_image, 7) == counted(config, 8, 7, "cpu")


def test_sd3_d15_on_the_meta_device() -> None:
    config = MMDiTConfig.from_preset("sd3-d15")
    assert flops_per_sample(config, 256, 154) == pytest.approx(counted(config, 32, 154, "meta"), rel=0.01)
