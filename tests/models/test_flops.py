import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stack.models.flops import flops_per_sample, peak_tflops
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.models.presets import PRESETS


def counted(config: MMDiTConfig, side: int, num_text: int, device: str) -> tuple[int, int]:
    """What PyTorch counts, per sample. The plain attention kernel, since fused ones recompute in the backward pass."""
    with torch.device(device):
        model = MMDiT(config)
        batch = (
            torch.empty(2, config.in_channels, side, side),
            torch.empty(2),
            torch.empty(2 * num_text, config.context_dim),
            [num_text] * 2,
            torch.empty(2, config.pooled_dim),
            torch.empty(2) if config.guidance_embedding else None,
        )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(*batch).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward // 2, counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("mmdit-test", {}),
        ("mmdit-test", {"depth": 1}),
        ("mmdit-test", {"mlp_ratio": 2}),
        ("mmdit-test", {"patch_size": 1, "rope_axes": (16, 16)}),
        ("mmdit-test", {"image_attention": 1}),
        ("flux-test", {}),
        ("flux-test", {"guidance_embedding": True}),
    ],
)
def test_closed_form_is_exact(preset: str, keys: dict[str, object]) -> None:
    config = MMDiTConfig.from_preset(preset, **keys)
    num_image = (8 // config.patch_size) ** 2
    assert flops_per_sample(config, num_image, 7) == counted(config, 8, 7, "cpu")


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("-qknorm")])
def test_every_preset_on_the_meta_device(preset: str) -> None:
    config = MMDiTConfig.from_preset(preset)
    assert flops_per_sample(config, 64, 154) == pytest.approx(counted(config, 16, 154, "meta"), rel=0.01)


def joint(config: MMDiTConfig, tokens: list[int]) -> int:
    """Of attention between text and image, forward, for samples of so many tokens."""
    return sum(4 * n**2 * config.width for n in tokens) * (config.depth + config.single_depth)


@pytest.mark.parametrize("preset", ["mmdit-test", "flux-test"])
def test_padding_costs_nothing(preset: str) -> None:
    """Captions of different lengths: each its own, and in attention by sdpa alone as the longest."""
    config, lengths = MMDiTConfig.from_preset(preset), [3, 9]
    model = MMDiT(config)
    batch = (torch.empty(2, config.in_channels, 8, 8), torch.empty(2), torch.empty(12, config.context_dim))
    alone = sum(flops_per_sample(config, 16, length)[0] for length in lengths)
    padded = joint(config, [16 + 9] * 2) - joint(config, [16 + length for length in lengths])
    for backend, more in (("reference", 0), ("sdpa", padded)):
        model.attention = backend
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(*batch, lengths, torch.empty(2, config.pooled_dim))
        assert counter.get_total_flops() == alone + more


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("Tesla T4", None),
    ],
)
def test_a_devices_peak_is_found_by_its_name(name: str, peak: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None


def test_flux_agrees_with_mlperf() -> None:
    """MLPerf Training v5.1: 20.38 TFLOP a sample at 256² and 256 text tokens."""
    _, both = flops_per_sample(MMDiTConfig.from_preset("flux-schnell"), 256, 256)
    assert both == pytest.approx(20.38e12, rel=0.01)
