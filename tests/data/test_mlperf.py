"""MLPerf's layout at its own widths: a sample of 256 pixels a side has 2,167,296 bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stack.data import mlperf
from stack.data.index import build_index
from stack.data.safety import DecodeError

SIZES = {"mean.bytes": 32_768, "logvar.bytes": 32_768, "t5.bytes": 2_097_152, "clip.bytes": 1_536}


def members() -> dict[str, bytes]:
    """Words of bfloat16 between 1 and 2, no two neighbours alike."""
    return {name: (0x3F80 + np.arange(size // 2) % 128).astype("<u2").tobytes() for name, size in SIZES.items()}


def test_the_sizes_and_the_order_of_the_numbers():
    assert mlperf.measure(SIZES) == 32
    sample = mlperf.decode(members())
    (text,) = sample.texts
    found = (sample.latent_mean, sample.latent_logvar, text.t5, text.pooled)
    shapes = [(16, 32, 32), (16, 32, 32), (256, 4096), (768,)]
    for tensor, shape in zip(found, shapes, strict=True):
        values = 1 + torch.arange(tensor.numel()) % 128 / 128
        assert torch.equal(tensor, values.reshape(shape).bfloat16())
    assert (text.clip_l.shape, text.clip_g) == ((0, 768), None)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("t5.bytes", 255 * 8192),
        ("t5.bytes", 512 * 8192),
        ("clip.bytes", 1280 * 2),
        ("logvar.bytes", 16 * 16 * 16 * 2),
        ("mean.bytes", 0),
    ],
)
def test_a_sample_of_other_sizes_is_left_out(tmp_path, pack, name, size):
    odd = {**members(), name: bytes(size)}
    for key, data in {"a": members(), "b": odd}.items():
        index = build_index(pack(tmp_path / "0.tar", [(f"{key}.{extension}", d) for extension, d in data.items()]))
        assert [*index.keys, *(rejected.key for rejected in index.rejected)] == [key]
        assert [reason.partition(":")[0] for _, reason in index.rejected] == (["not MLPerf's layout"] * (key == "b"))


def test_a_variance_that_is_no_float32_is_refused():
    logvar = np.frombuffer(members()["logvar.bytes"], "<u2").copy()
    logvar[5] = 0x42B0  # 88
    assert mlperf.decode({**members(), "logvar.bytes": logvar.tobytes()}).latent_logvar.exp().isfinite().all()
    logvar[5] = 0x4448  # 800
    with pytest.raises(DecodeError, match=r"variance too large: \.logvar\.bytes has e\^800"):
        mlperf.decode({**members(), "logvar.bytes": logvar.tobytes()})
