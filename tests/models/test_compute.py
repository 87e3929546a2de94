"""Compilation and recomputation change how a step is computed, not what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stack.config import UserError
from stack.models.compute import ComputeConfig, check, configure
from stack.models.mmdit import Block, MMDiT, MMDiTConfig

CPU = torch.device("cpu")


def model_of(preset: str, **keys: Any) -> MMDiT:
    model = MMDiT(MMDiTConfig.from_preset(preset, **keys))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def gradients(model: MMDiT, lengths: Sequence[int]) -> list[Tensor]:
    """The output and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(1)
    c, batch = model.config, len(lengths)
    velocity = model(
        torch.randn(batch, c.in_channels, 8, 8, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(sum(lengths), c.context_dim, generator=generator),
        list(lengths),
        torch.randn(batch, c.pooled_dim, generator=generator),
    )
    model.zero_grad()
    velocity.square().mean().backward()
    return [velocity.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)])
@pytest.mark.parametrize("recompute", ["all", "selective"])
@pytest.mark.parametrize("preset", ["mmdit-test", "flux-test"])
def test_recomputation_gives_the_same_bits(preset: str, recompute: Any, lengths: tuple[int, ...]) -> None:
    model = model_of(preset)
    expected = gradients(model, lengths)
    configure(model, ComputeConfig(recompute=recompute))
    assert_equal(gradients(model, lengths), expected, 0)


class Counted(TorchDispatchMode):
    """How often attention and an MLP's activation are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.activation = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention += func in (
            torch.ops.mmdit.attend_samples.default,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        )
        self.activation += func is torch.ops.aten.gelu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(5, 2), (5, 5)])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
@pytest.mark.parametrize(
    ("keys", "attention", "activation"),
    [
        ({}, 4, 7),  # the last block has no MLP for text
        ({"recompute": "all"}, 8, 14),
        ({"recompute": "selective"}, 4, 14),
        ({"recompute": "all", "recompute_every": 2}, 6, 11),
        ({"recompute": "selective", "recompute_every": 3}, 4, 10),
    ],
)
def test_nothing_is_computed_again_that_was_not_asked_for(
    keys: dict[str, Any], attention: int, activation: int, backend: Any, lengths: tuple[int, ...]
) -> None:
    model = model_of("mmdit-test", depth=4)
    config = ComputeConfig(attention=backend, **keys)
    check(config, model.config, CPU, torch.float32)
    configure(model, config)
    with Counted() as counted:
        gradients(model, lengths)
    assert (counted.attention, counted.activation) == (attention, activation)


def test_attention_whose_result_cannot_be_kept_is_refused() -> None:
    config, model = ComputeConfig(recompute="selective", attention="reference"), MMDiTConfig.from_preset("mmdit-test")
    with pytest.raises(UserError, match="selective keeps results of sdpa and varlen, not of attention=reference"):
        check(config, model, CPU, torch.float32)


def test_without_gradients_nothing_is_recomputed() -> None:
    model = model_of("mmdit-test")
    configure(model, ComputeConfig(recompute="all"))
    assert all(block.recompute is not None for block in model.modules() if isinstance(block, Block))
    with torch.inference_mode():
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(2, 32), [2], torch.zeros(1, 32))


@pytest.mark.parametrize(("preset", "kinds"), [("mmdit-test", 2), ("flux-test", 2)])
def test_a_kind_of_block_is_compiled_once(preset: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all its blocks and all captions' lengths, and once more for equal ones. SD3's last block is of a kind of its
    own."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(Block, "compile", lambda block, **keys: nn.Module.compile(block, backend=backend, **keys))
    torch._dynamo.reset()
    depth = {"depth": 4} if preset == "mmdit-test" else {"depth": 3, "single_depth": 3}
    model = model_of(preset, **depth)
    batches = [(5, 2), (3, 4), (9, 1), (5, 5), (7, 7), (4, 4)]
    expected = [gradients(model, lengths) for lengths in batches]
    configure(model, ComputeConfig(compile=True))
    for number, (lengths, eager) in enumerate(zip(batches, expected, strict=True)):
        assert_equal(gradients(model, lengths), eager, 1e-5)
        assert len(graphs) == (kinds if number < 3 else 2 * kinds)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("recompute", ["all", "selective"])
def test_compiled_and_recomputed(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "compile", lambda block, **keys: nn.Module.compile(block, backend="aot_eager", **keys))
    torch._dynamo.reset()
    model = model_of("flux-test", depth=2, single_depth=1)
    expected = gradients(model, (5, 2))
    configure(model, ComputeConfig(compile=True, recompute=recompute))
    assert_equal(gradients(model, (5, 2)), expected, 1e-5)
