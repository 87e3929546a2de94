"""The same network twice, ours and diffusers', and what is done with it: a training step, compilation, memory.

python networks.py SIDE FAMILY TASK JSON      a fresh process: seconds of the first compiled step, or bytes at the peak
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import Pass
from torch import Tensor, nn

CHANNELS, CONTEXT, POOLED = 16, 512, 256


class Case(NamedTuple):
    """What a step is measured on. `padded`: the text tokens that the peer computes for each caption."""

    family: str
    width: int
    depth: int
    side: int
    """Of the latent."""
    lengths: list[int]
    padded: int

    @property
    def num_image(self) -> int:
        return (self.side // 2) ** 2


class Inputs(NamedTuple):
    latent: Tensor
    t: Tensor
    captions: list[Tensor]
    pooled: Tensor
    target: Tensor


def inputs_of(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    batch, shape = len(case.lengths), (CHANNELS, case.side, case.side)
    return Inputs(
        torch.randn(batch, *shape, generator=generator),
        torch.rand(batch, generator=generator),
        [torch.randn(length, CONTEXT, generator=generator) for length in case.lengths],
        torch.randn(batch, POOLED, generator=generator),
        torch.randn(batch, *shape, generator=generator),
    )


def ours_of(case: Case) -> nn.Module:
    """SD3's blocks, or FLUX's with as many double as single ones; QK-RMSNorm in both."""
    from stack.models.mmdit import MMDiT, MMDiTConfig

    flux = case.family == "flux"
    head = 128 if flux else 64
    model = MMDiT(
        MMDiTConfig(
            depth=case.depth // 2 if flux else case.depth,
            single_depth=case.depth // 2 if flux else 0,
            width=case.width,
            num_heads=case.width // head,
            in_channels=CHANNELS,
            context_dim=CONTEXT,
            pooled_dim=POOLED,
            qk_norm=True,
            rope_axes=(16, 56, 56) if flux else (),
        )
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def theirs_of(model: Any) -> nn.Module:
    """diffusers' model with the same weights."""
    import diffusers

    from stack.models.convert import CLASSES, family_of, save

    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), "diffusers")
        peer = getattr(diffusers, CLASSES[family_of(model.config, "diffusers")])
        return peer.from_pretrained(folder, low_cpu_mem_usage=False)


def our_call(model: nn.Module, case: Case, x: Inputs) -> Callable[[], Tensor]:
    context, lengths = torch.cat(x.captions), list(case.lengths)
    return lambda: model(x.latent, x.t, context, lengths, x.pooled)


def their_call(model: nn.Module, case: Case, x: Inputs) -> Callable[[], Tensor]:
    """As the pipelines do: every caption padded to `case.padded`, and no mask."""
    context = torch.stack([nn.functional.pad(c, (0, 0, 0, case.padded - len(c))) for c in x.captions])
    if case.family == "sd3":
        return lambda: model(x.latent, context, x.pooled, 1000 * x.t, return_dict=False)[0]
    half = case.side // 2
    ids = torch.zeros(half, half, 3)
    ids[..., 1] += torch.arange(half)[:, None]
    ids[..., 2] += torch.arange(half)
    ids, text_ids = ids.flatten(0, 1), torch.zeros(case.padded, 3)

    def call() -> Tensor:
        packed = x.latent.unflatten(-1, (half, 2)).unflatten(-3, (half, 2)).permute(0, 2, 4, 1, 3, 5)
        packed = packed.flatten(3).flatten(1, 2)
        (out,) = model(packed, context, x.pooled, x.t, ids, text_ids, return_dict=False)
        return out.view(len(out), half, half, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.latent.shape)

    return call


def step_of(model: nn.Module, call: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """Forward and backward; gradients are dropped, as an optimizer does after it used them."""

    def step() -> None:
        (call() - target).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def timed(function: Callable[[], object]) -> Callable[[], Pass]:
    def once() -> Pass:
        gc.collect()
        began, processor = time.perf_counter(), time.process_time()
        function()
        return Pass(time.perf_counter() - began, time.process_time() - processor)

    return once


def compile_side(side: str, model: Any) -> nn.Module:
    """Ours by kind of block; diffusers' each block ("blocks") or as a "whole"."""
    if side == "ours":
        from stack.models.compute import ComputeConfig, configure

        configure(model, ComputeConfig(compile=True))
    elif side == "blocks":
        for block in [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]:
            block.compile()
    else:
        model.compile()
    return model


def recompute_side(side: str, model: Any) -> None:
    if side == "ours":
        from stack.models.compute import ComputeConfig, configure

        configure(model, ComputeConfig(recompute="all"))
    else:
        model.enable_gradient_checkpointing()


def built(side: str, case: Case) -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    x = inputs_of(case)
    ours = ours_of(case)
    model = ours if side == "ours" else theirs_of(ours)
    return model, (our_call if side == "ours" else their_call)(model, case, x), x.target


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


def main(side: str, task: str, case: Case) -> float:
    torch.manual_seed(0)
    model, call, target = built(side, case)
    model.train()
    step = step_of(model, call, target)
    if task == "compile":
        compile_side(side, model)
        first, second = timed(step)(), timed(step)()
        return first.seconds - second.seconds
    if task == "recompute":
        recompute_side(side, model)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what malloc keeps of the first step would hide the second
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak from here on
    step()
    return float(peak_bytes() - before)


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
    values: Sequence[Any] = json.loads(sys.argv[3])
    print(main(sys.argv[1], sys.argv[2], Case(*values)))
