import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stack.nn.embed import patchify, sincos_positions, table_coordinates, timestep_embedding, unpatchify


def test_timestep_embedding_is_cos_then_sin_of_1000_t() -> None:
    t = torch.tensor([0.0, 0.003, 1.0], dtype=torch.float64)
    embedding = timestep_embedding(t)
    assert embedding.shape == (3, 256)
    assert embedding.dtype == torch.float32
    for i in (0, 1, 60, 127):
        angle = 1000 * t * 10_000 ** (-i / 128)
        torch.testing.assert_close(embedding[:, i], angle.cos().float(), rtol=0, atol=2e-4)
        torch.testing.assert_close(embedding[:, 128 + i], angle.sin().float(), rtol=0, atol=2e-4)


def test_patch_orders() -> None:
    C, patch = 3, 2
    image = torch.arange(C * 4 * 6).reshape(1, C, 4, 6)
    tokens = patchify(image, patch)
    assert tokens.shape == (1, 6, 12)
    c, p, q, row, column = 2, 1, 0, 1, 2
    assert tokens[0, row * 3 + column, (c * 2 + p) * 2 + q] == image[0, c, row * 2 + p, column * 2 + q]

    tokens = torch.arange(6 * 12).reshape(1, 6, 12)
    image = unpatchify(tokens, 2, 3, patch)
    assert image[0, c, row * 2 + p, column * 2 + q] == tokens[0, row * 3 + column, (p * 2 + q) * C + c]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_patches_come_back(height: int, width: int, patch: int, channels: int) -> None:
    image = torch.randn(2, channels, height * patch, width * patch)
    tokens = patchify(image, patch)
    there = tokens.unflatten(-1, (channels, patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(there, height, width, patch), image)


def test_sincos_table_is_column_then_row() -> None:
    table = sincos_positions(torch.tensor([2.0, 5.0]).double(), torch.tensor([3.0, 4.0, 7.0]).double(), 16)
    assert table.shape == (6, 16)
    assert table.dtype == torch.float32
    column, row = 7.0, 5.0
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [f(x * w) for x in (column, row) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(table[5], torch.tensor(expected))


def test_the_crop_is_in_the_centre() -> None:
    whole = table_coordinates(192, 192, 64)
    assert whole[0] == 0
    assert whole[3] == 1
    assert torch.equal(table_coordinates(64, 192, 64), whole[64:128])
    assert torch.equal(table_coordinates(5, 192, 64), whole[93:98])


def test_high_resolution_grid_of_the_paper() -> None:
    """SD3 §5.3.2 for S = 1024 pixels, h_max = 128: −8 … 23.75, and its 64-crop 0 … 15.75."""
    grid = table_coordinates(128, 128, 128 * 256 / 1024, (64 - 128) / 2 * 256 / 1024)
    assert (grid[0], grid[-1]) == (-8, 23.75)
    crop = table_coordinates(64, 128, 128 * 256 / 1024, -8)
    assert (crop[0], crop[-1]) == (0, 15.75)


def test_an_image_beyond_the_table_says_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"17 patches.*16"):
        table_coordinates(17, 16, 16)
