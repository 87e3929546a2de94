import torch
from torch import nn

from stack.nn.linear import Linear, decay_groups
from stack.nn.norms import RMSNorm


def names(pairs: list[tuple[str, nn.Parameter]]) -> list[str]:
    return [name for name, _ in pairs]


def test_biases_and_norms_take_no_decay_even_after_materialisation() -> None:
    with torch.device("meta"):
        module = nn.Sequential(Linear(4, 4), RMSNorm(4), nn.Sequential(Linear(4, 2)))
    module.to_empty(device="cpu")
    decay, rest = decay_groups(module)
    assert names(decay) == ["0.weight", "2.0.weight"]
    assert names(rest) == ["0.bias", "1.weight", "2.0.bias"]
    assert decay[0][1] is module[0].weight


def test_frozen_parameters_are_in_no_group() -> None:
    module = Linear(4, 4)
    module.weight.requires_grad_(False)
    decay, rest = decay_groups(module)
    assert decay == []
    assert names(rest) == ["bias"]
