"""B batch · A heads · S tokens · E head size"""

import math

import torch

from stack.nn.attention import attend


def test_matches_the_formula_and_ignores_masked_keys() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_BS = torch.tensor([[True] * 5, [True, False, True, False, False]])
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask_BS[:, None, None], -math.inf)
    torch.testing.assert_close(attend(q, k, v, mask_BS), scores.softmax(-1) @ v)

    moved = v + 100 * ~mask_BS[:, None, :, None]
    torch.testing.assert_close(attend(q, k, moved, mask_BS), attend(q, k, v, mask_BS))


def test_no_mask_is_a_mask_of_ones() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, torch.ones(2, 5, dtype=torch.bool)))
