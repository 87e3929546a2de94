"""B batch · S tokens · A heads · E head size"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stack.config import UserError
from stack.nn import attention
from stack.nn.attention import attend, choose, xformers_mask
from stack.nn.layout import Layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKENDS = ("sdpa", "varlen", "flex", "reference")
FORMS = {"batch": [3, 3], "row": [3, 1, 130]}


def qkv(layout: Layout, lengths: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(length + layout.num_image for length in lengths)
    shape = (1, tokens) if layout.packing is not None else (len(lengths), tokens // len(lengths))
    return torch.randn(3, *shape, 2, 16, dtype=dtype, generator=generator)


def formula(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Over whole samples, one after the other, whatever form they have."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    attended = []
    for sample in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        one_q, one_k, one_v = sample
        scores = torch.einsum("qae,kae->aqk", one_q, one_k) / 4
        attended.append(torch.einsum("aqk,kae->qae", scores.softmax(-1), one_v))
    return torch.cat(attended)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_formula(backend: str, form: str) -> None:
    lengths = FORMS[form]
    layout = Layout.of(lengths, 5, CPU, backend)
    assert (layout.packing is None) == (form == "batch")
    backward = backend != "flex"  # which has none on a CPU
    q, k, v = qkv(layout, lengths, torch.float64 if backward else torch.float32).requires_grad_(backward)
    expected = formula(q, k, v, [length + 5 for length in lengths]).view_as(q)
    attended = attend(q, k, v, layout)
    tolerance = 1e-10 if backward else 1e-5
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)
    if backward:
        weights = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad((attended * weights).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_bfloat16_is_near(backend: str) -> None:
    lengths = [3, 1, 9]
    layout = Layout.of(lengths, 5, CPU, backend)
    q, k, v = qkv(layout, lengths, torch.bfloat16)
    attended = attend(q, k, v, layout)
    assert attended.dtype == torch.bfloat16
    expected = formula(q.double(), k.double(), v.double(), [length + 5 for length in lengths])
    torch.testing.assert_close(attended.double()[0], expected, rtol=0.02, atol=0.02)


def test_operators_are_sound() -> None:
    lengths = [2, 4]
    layout = Layout.of(lengths, 3, CPU, "varlen")
    q, k, v = qkv(layout, lengths).requires_grad_()
    assert layout.packing is not None
    torch.library.opcheck(torch.ops.mmdit.attend_samples, (q, k, v, layout.packing.starts))


def test_the_document_mask_is_xformers_mask() -> None:
    lengths = [3, 700, 1, 260, 12]
    layout = Layout.of(lengths, 5, CPU, "flex")
    assert layout.packing is not None
    num_tokens = sum(lengths) + 25
    theirs = xformers_mask(layout.packing).materialize((num_tokens, num_tokens)) == 0
    mask = layout.packing.block_mask
    every = torch.arange(num_tokens)
    ours = mask.mask_mod(None, None, every[:, None], every[None])
    assert torch.equal(ours, theirs)
    blocks = -(-num_tokens // 128)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = theirs
    tiles = padded.unflatten(0, (blocks, 128)).unflatten(2, (blocks, 128)).transpose(1, 2).flatten(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(-1))
    assert mask.full_kv_num_blocks.sum() > 0
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        assert tiles[row, mask.full_kv_indices[0, 0, row, :count].long()].all()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with a GPU of compute capability 8.0, as far as refusals look at it; sets another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    choose.cache_clear()
    yield monkeypatch
    choose.cache_clear()


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_size", "backward", "says"),
    [
        ("xformers", CPU, torch.float32, 64, True, "needs a GPU, got cpu"),
        ("xformers", CUDA, torch.float64, 64, True, "needs bfloat16, float16 or float32, got torch.float64"),
        ("xformers", CUDA, torch.bfloat16, 12, True, "multiple of 8 in torch.bfloat16, got 12"),
        ("xformers", CUDA, torch.float32, 6, True, "multiple of 4 in torch.float32, got 6"),
        ("xformers", CUDA, torch.float32, 12, True, None),
        ("xformers", CUDA, torch.bfloat16, 64, True, None),
        ("flex", CPU, torch.float32, 64, True, "has no backward pass on cpu"),
        ("flex", CPU, torch.float32, 8, False, None),
        ("flex", CUDA, torch.bfloat16, 8, False, "needs heads of 16 or more on a GPU, got 8"),
        ("flex", CUDA, torch.bfloat16, 16, True, None),
        ("varlen", CUDA, torch.float32, 64, True, "needs bfloat16 or float16 on a GPU"),
        ("varlen", CUDA, torch.bfloat16, 12, True, "multiple of 8 up to 256, got 12"),
        ("varlen", CUDA, torch.bfloat16, 264, True, "multiple of 8 up to 256, got 264"),
        ("varlen", CUDA, torch.bfloat16, 256, True, None),
    ],
)
def test_a_backend_that_cannot_says_why(
    gpu: pytest.MonkeyPatch, backend: Any, device: Any, dtype: Any, head_size: int, backward: bool, says: str | None
) -> None:
    if says is None:
        assert choose(backend, device, dtype, head_size, backward) == backend
    else:
        with pytest.raises(UserError, match=rf"compute\.attention={backend}: .*{says}"):
            choose(backend, device, dtype, head_size, backward)


def test_an_old_gpu_has_no_flash_attention(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("auto", CUDA, torch.float16, 64, True) == "sdpa"
    for backend, dtype in (("varlen", torch.float16), ("xformers", torch.bfloat16)):
        with pytest.raises(UserError, match=r"needs compute capability 8\.0, this GPU has 7\.5"):
            choose(backend, CUDA, dtype, 64, True)
    assert choose("xformers", CUDA, torch.float16, 64, True) == "xformers"


def test_auto_says_its_choice_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a training's pass and of a preview's without gradients, for each dtype."""
    choose.cache_clear()
    attention._tell.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        assert {choose("auto", CPU, dtype, 48, backward) for backward in (True, False, True)} == {"varlen"}
    said = capsys.readouterr().err
    assert said == "attention: varlen on cpu in float32\nattention: varlen on cpu in bfloat16\n"


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex", "xformers"])
def test_backends_agree_on_a_gpu(backend: str, form: str) -> None:
    device, lengths = torch.device("cuda"), FORMS[form]
    layout = Layout.of(lengths, 5, device, backend)
    q, k, v = qkv(layout, lengths, torch.bfloat16).to(device).requires_grad_()
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    weights = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attended = attend(q, k, v, layout)
    expected = formula(*wide, [length + 5 for length in lengths]).view_as(weights)
    ours = torch.autograd.grad(attended, (q, k, v), weights.to(q))
    theirs = torch.autograd.grad(expected, wide, weights)
    for a, b in zip((attended, *ours), (expected, *theirs), strict=True):
        assert (a.double().cpu() - b).abs().max() < 0.03 * b.abs().max()
