"""B batch · N tokens · D width"""

import torch
import torch.nn.functional as F

from stack.nn.kernels.gated_residual import gated_residual
from stack.nn.kernels.modulated_norm import modulated_norm


def test_plain_forms_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 7, 16, dtype=torch.float64, generator=generator)
    for shape in ((3, 1, 16), (3, 7, 16)):
        shift, scale, gate = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
        expected = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
        torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
        torch.testing.assert_close(gated_residual(x, gate, y), x + gate * y)
