"""The kernels' plain form against the formula, their Triton form against the plain one in float64.

Triton's kernels run on a GPU, or in its interpreter where there is none, see tests/conftest.py.

B batch · N or S tokens · D width · A heads · E head size
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stack.nn import kernels
from stack.nn.kernels import gated_residual as residual_module
from stack.nn.kernels import modulated_norm as norm_module
from stack.nn.kernels import norm_rotate as rotate_module
from stack.nn.kernels.gated_residual import gated_residual
from stack.nn.kernels.modulated_norm import modulated_norm
from stack.nn.kernels.norm_rotate import norm_rotate
from stack.nn.rope import Rotation

ROOT = Path(__file__).parents[2]
MODULES = (norm_module, residual_module, rotate_module)
INTERPRETED = not torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# A result is rounded once; the interpreter rounds towards zero to bfloat16.
TOLERANCE = {
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}

Function = Callable[..., Tensor]
UseTriton = Callable[[bool], None]


# The functions, of tensors that are cut out of wider ones, as they are in a model.


def norm(x: Tensor, vectors: Tensor) -> Tensor:
    _, shift, scale, *_ = vectors.chunk(6, dim=-1)
    return modulated_norm(x[..., 1:], shift, scale)


def residual(x: Tensor, vectors: Tensor, y: Tensor) -> Tensor:
    return gated_residual(x[..., 1:], vectors.chunk(6, dim=-1)[2], y[..., 2:])


def keys(*tables: int) -> Function:
    """`norm_rotate`, with tables of angles of the shape `tables`, or none."""
    angles = torch.linspace(0, 7, torch.Size(tables).numel()).view(tables)

    def keys(qkv: Tensor, weight: Tensor) -> Tensor:
        rotation = Rotation(angles.cos().to(qkv.device), angles.sin().to(qkv.device)) if tables else None
        return norm_rotate(qkv.unbind(2)[1], weight, rotation)

    return keys


def norm_shapes(B: int, N: int, D: int, *each: int) -> list[tuple[int, ...]]:
    return [(B, N, D + 1), (*each, 6 * D)]


def residual_shapes(B: int, N: int, D: int, *each: int) -> list[tuple[int, ...]]:
    return [(B, N, D + 1), (*each, 6 * D), (B, N, D + 2)]


def keys_shapes(B: int, S: int, A: int, E: int) -> list[tuple[int, ...]]:
    return [(B, S, 3, A, E), (E,)]


SMALL = {
    "norm": (norm, norm_shapes(2, 5, 48, 2, 1)),
    "norm-one-vector": (norm, norm_shapes(2, 5, 7, 1, 1)),
    "norm-vector-each": (norm, norm_shapes(1, 5, 48, 1, 5)),
    "norm-power-of-two": (norm, norm_shapes(3, 1, 32, 3, 1)),
    "residual": (residual, residual_shapes(2, 5, 48, 2, 1)),
    "residual-one-vector": (residual, residual_shapes(2, 5, 7, 1, 1)),
    "residual-vector-each": (residual, residual_shapes(1, 5, 48, 1, 5)),
    "keys": (keys(), keys_shapes(2, 5, 3, 16)),
    "keys-odd": (keys(), keys_shapes(1, 5, 1, 7)),
    "keys-turned": (keys(5, 8), keys_shapes(2, 5, 3, 16)),
    "keys-turned-alike": (keys(1, 5, 12), keys_shapes(2, 5, 4, 24)),
    "keys-turned-each": (keys(2, 5, 8), keys_shapes(2, 5, 3, 16)),
}
LARGE = {
    "norm": (norm, norm_shapes(2, 1000, 1536, 2, 1)),
    "norm-vector-each": (norm, norm_shapes(1, 1000, 3072, 1, 1000)),
    "residual": (residual, residual_shapes(2, 1000, 1536, 2, 1)),
    "residual-vector-each": (residual, residual_shapes(1, 1000, 3072, 1, 1000)),
    "keys": (keys(), keys_shapes(2, 1000, 38, 64)),
    "keys-turned": (keys(1000, 64), keys_shapes(2, 1000, 24, 128)),
}


@pytest.fixture
def use_triton(monkeypatch: pytest.MonkeyPatch) -> UseTriton:
    """Says which form computes from then on. In its backward pass a program takes three tokens, the last one fewer."""
    fused = pytest.importorskip("stack.nn.kernels.fused")
    monkeypatch.setattr(fused, "PROGRAMS", 3)

    def use_triton(yes: bool) -> None:
        for module in MODULES:
            monkeypatch.setattr(module, "runs_fused", lambda x: yes)

    return use_triton


def normal(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Numbers of `dtype`, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).double() for shape in shapes]


def compute(function: Function, numbers: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Its value and its gradients by all `numbers`, in a random direction of whole numbers, which each dtype holds."""
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in numbers]
    out = function(*leaves)
    assert out.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    direction = torch.randint(-9, 10, out.movedim(0, -2).shape, generator=generator).movedim(-2, 0)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(device, dtype))]


def assert_equal_forms(
    use_triton: UseTriton,
    function: Function,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: str,
    atol: float,
) -> None:
    numbers = normal(0, shapes, dtype)
    use_triton(False)
    expected = compute(function, numbers, torch.float64, "cpu")
    use_triton(True)
    for actual, exact in zip(compute(function, numbers, dtype, device), expected, strict=True):
        torch.testing.assert_close(actual.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=atol)


def test_plain_forms_are_the_formulas() -> None:
    x, y = normal(0, [(3, 7, 16)] * 2, torch.float64)
    for shape in ((3, 1, 16), (3, 7, 16)):
        shift, scale, gate = normal(1, [shape] * 3, torch.float64)
        expected = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
        torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
        torch.testing.assert_close(gated_residual(x, gate, y), x + gate * y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_triton_forms_are_the_plain_ones(use_triton: UseTriton, case: str, dtype: torch.dtype, device: str) -> None:
    assert_equal_forms(use_triton, *SMALL[case], dtype, device, atol=1e-12 if dtype == torch.float64 else 5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_triton_forms_are_the_plain_ones_in_a_models_sizes(
    use_triton: UseTriton, case: str, dtype: torch.dtype
) -> None:
    assert_equal_forms(use_triton, *LARGE[case], dtype, "cuda", atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (norm, norm_shapes(1, 3, 3, 1, 1)),
        (norm, norm_shapes(1, 2, 3, 1, 2)),
        (residual, residual_shapes(1, 3, 2, 1, 1)),
        (keys(), keys_shapes(1, 2, 2, 3)),
        (keys(3, 1), keys_shapes(1, 3, 2, 2)),
    ],
)
def test_gradients_are_those_of_finite_differences(
    use_triton: UseTriton, function: Function, shapes: list[tuple[int, ...]], device: str
) -> None:
    use_triton(True)
    leaves = [leaf.to(device).requires_grad_() for leaf in normal(0, shapes, torch.float64)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "num_kept"), [("norm", 2 * 2 * 5), ("residual", 0), ("keys-turned", 2 * 5 * 3)])
def test_only_statistics_are_kept(use_triton: UseTriton, case: str, num_kept: int, device: str) -> None:
    """For the backward pass, beside what the functions were given."""
    use_triton(True)
    function, shapes = SMALL[case]
    leaves = [leaf.to(device).requires_grad_() for leaf in normal(0, shapes, torch.float64)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*leaves)
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    own = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in given]
    assert sum(tensor.numel() for tensor in own if tensor.dtype == torch.float64) == num_kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["norm", "residual", "keys-turned"])
def test_a_gradient_may_be_one_number_expanded(use_triton: UseTriton, case: str, device: str) -> None:
    """As that of a sum is."""
    function, shapes = SMALL[case]
    gradients = []
    for form in (True, False):
        use_triton(form)
        leaves = [leaf.to(device).requires_grad_() for leaf in normal(0, shapes, torch.float64)]
        gradients.append(torch.autograd.grad(function(*leaves).sum(), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled for the GPU")
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler would not. In a process of its own: Triton is either of them."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_kernels() -> None:
    """What launches on an H100 do before they run, without one."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from stack.nn.kernels import fused

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    launch = JITFunction.run
    compiled = set()

    def compile_only(kernel: JITFunction, *args: object, **options: object) -> None:
        launch(kernel, *args, **{**options, "warmup": True})
        compiled.add(kernel.__name__)

    JITFunction.run = compile_only
    for module in MODULES:
        module.runs_fused = lambda x: True
    for programs in (fused.PROGRAMS, 3):  # of the backward pass: one token each, or several
        fused.PROGRAMS = programs
        for cases, dtype in ((LARGE, torch.bfloat16), (SMALL, torch.float64)):
            for function, shapes in cases.values():
                compute(function, [torch.zeros(shape) for shape in shapes], dtype, "cpu")
    forward = {"_modulated_norm", "_gated_residual", "_norm_rotate"}
    assert compiled == forward | {f"{name}_backward" for name in forward}, compiled


def test_forms_are_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.runs_fused(torch.empty(1))
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert kernels.runs_fused(on_gpu)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not kernels.runs_fused(on_gpu)
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not kernels.runs_fused(on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_on_a_gpu(case: str) -> None:
    """The public functions: what Triton computes twice is equal to the bit, and close to the compiled plain form."""
    function, shapes = LARGE[case]
    numbers = normal(0, shapes, torch.float32)
    once, again = (compute(function, numbers, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    compiled = compute(torch.compile(function, fullgraph=True), numbers, torch.float32, "cuda")
    for a, b in zip(once, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    compile_kernels()
