import torch

from stack.nn.modulation import triples


def test_order_is_shift_scale_gate_for_attention_then_for_the_mlp() -> None:
    attn, mlp = triples(torch.arange(12.0).view(1, 1, 12), 2)
    assert [x.tolist() for x in attn] == [[[[0, 1]]], [[[2, 3]]], [[[4, 5]]]]
    assert [x.tolist() for x in mlp] == [[[[6, 7]]], [[[8, 9]]], [[[10, 11]]]]
