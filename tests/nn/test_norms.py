import torch

from stack.nn.norms import RMSNorm


def test_rms_norm_computes_in_float32() -> None:
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight, 1, 0.1, generator=torch.Generator().manual_seed(1))
    norm = norm.bfloat16()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected.bfloat16(), rtol=2**-8, atol=0)  # one rounding, at the end
    torch.testing.assert_close(norm.double()(wide), expected, rtol=1e-12, atol=0)
