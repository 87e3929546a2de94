"""B batch · S tokens · A heads · E head size"""

import cmath

import pytest
import torch

from stack.nn.rope import grid_ids, rotate, rotation


def test_ids() -> None:
    assert grid_ids(2, 3, 2).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid_ids(1, 2, 3).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_rotates_pairs_as_complex_numbers() -> None:
    ids_SK = torch.tensor([[0, 0, 0], [0, 3, 5]])
    x = torch.randn(1, 2, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation(ids_SK, (16, 56, 56)))
    torch.testing.assert_close(turned[:, 0], x[:, 0], rtol=0, atol=0)  # text stands at id 0
    for pair, angle in ((3, 0.0), (8, 3.0), (9, 3 * 10_000 ** (-2 / 56)), (36, 5.0), (63, 5 * 10_000 ** (-54 / 56))):
        z = complex(*x[0, 1, 0, 2 * pair : 2 * pair + 2]) * cmath.exp(1j * angle)
        torch.testing.assert_close(turned[0, 1, 0, 2 * pair : 2 * pair + 2].tolist(), [z.real, z.imag])


def test_scores_depend_on_differences_of_position_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(at_q: tuple[int, int], at_k: tuple[int, int]) -> torch.Tensor:
        turned = [rotate(x, rotation(torch.tensor([at]), (4, 4))) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((1, 2), (4, 0)), score((11, 7), (14, 5)))
    assert not torch.isclose(score((1, 2), (4, 0)), score((1, 2), (4, 1)))


def test_bfloat16_is_rounded_once() -> None:
    by = rotation(torch.tensor([[900, 700]]), (32, 32))
    x = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, by)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotate(x.double(), by).bfloat16(), rtol=2**-8, atol=1e-6)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 ids.*\(4, 4, 4\)"):
        rotation(torch.zeros(1, 2), (4, 4, 4))
    with pytest.raises(ValueError, match=r"8 channels.*heads of 16"):
        rotate(torch.zeros(1, 1, 1, 16), rotation(torch.zeros(1, 2), (4, 4)))
