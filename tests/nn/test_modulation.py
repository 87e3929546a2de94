import torch
import torch.nn.functional as F

from stack.nn.modulation import AdaLN, Modulation, modulate


def test_order_is_shift_scale_gate_for_attention_then_for_the_mlp() -> None:
    modulation = Modulation(4)
    vec = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    attn, mlp = modulation(vec)
    rows = modulation.linear(F.silu(vec)).unflatten(-1, (6, 1, 4)).unbind(1)
    named = (attn.shift_B1D, attn.scale_B1D, attn.gate_B1D, mlp.shift_B1D, mlp.scale_B1D, mlp.gate_B1D)
    for ours, row in zip(named, rows, strict=True):
        torch.testing.assert_close(ours, row)


def test_adaln_gives_shift_before_scale() -> None:
    adaln = AdaLN(2)
    torch.nn.init.zeros_(adaln.linear.weight)
    adaln.linear.bias = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    result = adaln(torch.ones(1, 2))
    assert result.shift_B1D.tolist() == [[[1, 2]]]
    assert result.scale_B1D.tolist() == [[[3, 4]]]


def test_modulate() -> None:
    assert modulate(torch.tensor(2.0), torch.tensor(10.0), torch.tensor(0.5)) == 13
