"""The rows of the model's benchmark: what is measured against what, and against which target."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
from captions import read_captions, some_captions, token_lengths
from command import MALLOC
from contenders import ROOT
from networks import (
    Case,
    Inputs,
    compile_side,
    inputs_of,
    our_call,
    ours_of,
    step_of,
    their_call,
    theirs_of,
    timed,
)
from pairs import Row, side_by_side
from peers import Pass
from torch import Tensor

EMOJI = ROOT.parent / "shared" / "data" / "emoji"
PADDED = {"sd3": 333, "flux": 256}
PAIRS = 7
SECONDS, BYTES = "steps/s", "GB"
Peer = Callable[..., Callable[[], Tensor]]
"""From q, k and v in a row, the samples' lengths and their image tokens to a call that attends them."""


class Benchmark:
    def __init__(self, quick: bool):
        self._quick = quick

    @cached_property
    def rows(self) -> dict[str, Callable[[str], Row]]:
        """By name, in the order of the report."""
        return {
            "step, SD3 / padded to 333": partial(self._step, "sd3", False, False, 2.0),
            "compiled, SD3 / padded to 333": partial(self._step, "sd3", False, True, 1.7),
            "step, FLUX / padded to 256": partial(self._step, "flux", False, False, 1.6),
            "step, SD3, equal tokens": partial(self._step, "sd3", True, False, 1.0),
            "compiled, SD3, equal tokens": partial(self._step, "sd3", True, True, 1.0),
            "step, FLUX, equal tokens": partial(self._step, "flux", True, False, 1.0),
            "compilation, SD3's 24 blocks / as a whole": partial(self._compilation, "whole", 3.0),
            "compilation, SD3's 24 blocks / each block": partial(self._compilation, "blocks", None),
            "attention, packed / padded to 333, masked": partial(self._attention, partial(_masked, text=333), 1.4),
            "attention, packed / padded to longest, masked": partial(self._attention, _masked, 1.4),
            "attention, packed / nested": partial(self._attention, _nested, 5.0),
            "sampling, 20 steps, guided / diffusers": self._sampling,
            "AdamW and EMA / EMAModel": self._optimizer,
            "EMA / AveragedModel": self._ema,
            "peak memory, SD3, equal tokens": partial(self._peak, "step", True),
            "peak memory, SD3, equal tokens, recomputed": partial(self._peak, "recompute", True),
            "peak memory, SD3 / padded to 333": partial(self._peak, "step", False),
        }

    def run(self, name: str) -> Row:
        return self.rows[name](name)

    def close(self) -> None:
        pass

    @property
    def _pairs(self) -> int:
        return 1 if self._quick else PAIRS

    @cached_property
    def _lengths(self) -> list[int]:
        """Tokens of four emoji's captions."""
        return token_lengths(some_captions(read_captions(EMOJI), 4))

    def _case(self, family: str, equal: bool) -> Case:
        if self._quick:
            return Case(family, 128, 2, 8, [5, 5] if equal else [3, 7], 7 if not equal else 5)
        lengths = [max(self._lengths)] * len(self._lengths) if equal else self._lengths
        return Case(family, 512, 6, 32, lengths, lengths[0] if equal else PADDED[family])

    # ---- a training step

    def _step(self, family: str, equal: bool, compiled: bool, target: float, name: str) -> Row:
        case = self._case(family, equal)
        x, ours = inputs_of(case), ours_of(case)
        theirs = theirs_of(ours)
        calls = our_call(ours, case, x), their_call(theirs, case, x)
        if equal:
            with torch.no_grad():
                velocity, expected = (call() for call in calls)
            if (velocity - expected).abs().max() > 1e-4 * expected.abs().max():
                raise RuntimeError(f"{name}: the outputs differ")
        if compiled:
            compile_side("ours", ours)
            compile_side("blocks", theirs)
        passes = [
            timed(step_of(model.train(), call, x.target)) for model, call in zip((ours, theirs), calls, strict=True)
        ]
        return side_by_side(name, *passes, 1, SECONDS, target, self._pairs)

    # ---- in processes of their own

    def _compilation(self, side: str, target: float | None, name: str) -> Row:
        case = self._case("sd3", True)
        case = case if self._quick else case._replace(depth=24)
        seconds = [self._alone(one, "compile", case) for one in ("ours", side)]
        return Row(name, *seconds, seconds[1] / seconds[0], target, "s", 1)

    def _peak(self, task: str, equal: bool, name: str) -> Row:
        """Bytes that a step takes beside weights, inputs and the libraries."""
        case = self._case("sd3", equal)
        sides = [[self._alone(side, task, case) for _ in range(min(3, self._pairs))] for side in ("ours", "theirs")]
        ours, peer = (median(side) / 1e9 for side in sides)
        return Row(name, ours, peer, peer / ours, 1.0, BYTES, len(sides[0]))

    def _alone(self, side: str, task: str, case: Case) -> float:
        command = [sys.executable, str(Path(__file__).with_name("networks.py")), side, task, json.dumps(case)]
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        environment = {key: value for key, value in environment.items() if key not in MALLOC}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return float(done.stdout.splitlines()[-1])

    # ---- attention

    def _attention(self, peer: Peer, target: float, name: str) -> Row:
        from stack.nn.attention import attend
        from stack.nn.layout import Layout

        num_image, heads, size = (16, 2, 16) if self._quick else (256, 8, 64)
        text = [3, 5] if self._quick else [*self._lengths, *(4 * length for length in self._lengths)]
        lengths = [length + num_image for length in text]
        qkv = torch.randn(3, 1, sum(lengths), heads, size, generator=torch.Generator().manual_seed(0))
        qkv.requires_grad_()
        layout = Layout.of(text, num_image, torch.device("cpu"), "varlen")
        calls = [lambda: attend(*qkv, layout), peer(qkv, lengths, num_image)]
        outputs = [call() for call in calls]
        torch.testing.assert_close(outputs[0].detach(), outputs[1].detach(), rtol=1e-4, atol=1e-4)

        def both_ways(call: Callable[[], Tensor]) -> Callable[[], Pass]:
            def once() -> None:
                call().sum().backward()
                qkv.grad = None

            return timed(once)

        return side_by_side(name, *map(both_ways, calls), 1, SECONDS, target, self._pairs)

    # ---- sampling

    def _sampling(self, name: str) -> Row:
        from stack.flow import solvers
        from stack.flow.guidance import GuidanceConfig, Guided, branches
        from stack.flow.process import FlowConfig
        from stack.text.conditioning import Context

        steps, scale = (3 if self._quick else 20), 4.0
        case = self._case("sd3", False)
        x, ours = inputs_of(case), ours_of(case)
        theirs = theirs_of(ours)
        case, x = case._replace(lengths=case.lengths[:1]), Inputs(*(value[:1] for value in x))
        nothing = torch.zeros(1, x.captions[0].shape[1])
        cond = Context(x.captions[0], list(case.lengths), x.pooled)
        uncond = Context(nothing, [1], torch.zeros_like(x.pooled))

        flow = FlowConfig()

        def network(latent: Tensor, t: Tensor, captions: Context) -> Tensor:
            return ours(latent, t, *captions)

        def our_sampling() -> Tensor:
            velocity = Guided(GuidanceConfig(scale=scale), flow, branches(flow, network, cond, uncond, Context.cat))
            with torch.inference_mode():
                return solvers.euler(velocity, x.latent, flow.grid(steps))

        def their_sampling(empty_tokens: int, padded: int) -> Tensor:
            """The pipeline's loop: both halves in one batch, each caption padded."""
            from diffusers import FlowMatchEulerDiscreteScheduler

            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
            latent = x.latent
            pads = [torch.nn.functional.pad(c, (0, 0, 0, padded - len(c))) for c in (nothing, x.captions[0])]
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    if empty_tokens == padded:
                        both = theirs(
                            torch.cat([latent] * 2), torch.stack(pads), torch.cat([uncond.pooled_BD, x.pooled]),
                            t.expand(2), return_dict=False,
                        )[0]  # fmt: skip
                        v_uncond, v_cond = both.chunk(2)
                    else:
                        v_uncond, v_cond = (
                            theirs(latent, c[None], pooled, t.expand(1), return_dict=False)[0]
                            for c, pooled in ((nothing, uncond.pooled_BD), (x.captions[0], x.pooled))
                        )
                    latent = scheduler.step(v_uncond + scale * (v_cond - v_uncond), t, latent, return_dict=False)[0]
            return latent

        exact = their_sampling(1, len(x.captions[0]))  # each half with its own tokens
        if (our_sampling() - exact).abs().max() > 1e-3 * exact.abs().max():
            raise RuntimeError(f"{name}: the outputs differ")
        padded = partial(their_sampling, case.padded, case.padded)
        return side_by_side(name, timed(our_sampling), timed(padded), 1, "images/s", 1.9, self._pairs)

    # ---- optimizer

    def _network(self) -> torch.nn.Module:
        """101 million parameters."""
        size = 64 if self._quick else 2048
        return torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(2 if self._quick else 24)))

    def _optimizer(self, name: str) -> Row:
        from diffusers.training_utils import EMAModel

        from stack.parallel.ema import Ema, EmaConfig
        from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig, adamw_arguments

        optim = OptimConfig()
        ours, theirs = (copy.deepcopy(network) for network in [self._network()] * 2)
        engine = LocalEngine(ours, optim, ParallelConfig(precision="fp32"), torch.device("cpu"))
        average = Ema(engine, EmaConfig())
        adamw = torch.optim.AdamW(theirs.parameters(), weight_decay=optim.weight_decay, **adamw_arguments(optim))
        their_average = EMAModel(theirs.parameters(), decay=0.9999, foreach=True)
        gradients = [torch.full_like(p, 1e-3) for p in ours.parameters()]

        def give(network: torch.nn.Module) -> None:
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient

        def our_update() -> None:
            engine.optimizer.step()
            average.update(1000)

        def their_update() -> None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), optim.clip)
            adamw.step()
            their_average.step(theirs.parameters())

        give(ours), give(theirs)
        return side_by_side(name, timed(our_update), timed(their_update), 1, SECONDS, 1.4, self._pairs)

    def _ema(self, name: str) -> Row:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        from stack.parallel.ema import Ema, EmaConfig
        from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig

        network = self._network()
        theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        engine = LocalEngine(network, OptimConfig(), ParallelConfig(precision="fp32"), torch.device("cpu"))
        ours = Ema(engine, EmaConfig())
        theirs.update_parameters(network)
        passes = timed(lambda: ours.update(1000)), timed(lambda: theirs.update_parameters(network))
        return side_by_side(name, *passes, 1, SECONDS, 1.0, self._pairs)


def _masked(qkv: Tensor, lengths: Sequence[int], num_image: int, text: int = 0) -> Callable[[], Tensor]:
    """Padded to `text` text tokens or to the longest, with a mask; padding and its removal are not counted."""
    batch, longest = len(lengths), max(*lengths, num_image + text)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(3, batch, longest, *qkv.shape[3:])
    padded[:, real] = qkv.detach()[:, 0]
    padded = padded.transpose(2, 3).contiguous().requires_grad_()

    def call() -> Tensor:
        attended = torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=real[:, None, None])
        padded.grad = None
        return attended.transpose(1, 2)[real][None]

    return call


def _nested(qkv: Tensor, lengths: Sequence[int], num_image: int) -> Callable[[], Tensor]:
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    parts = [torch.nested.nested_tensor_from_jagged(x[0].detach(), offsets).requires_grad_() for x in qkv]

    def call() -> Tensor:
        for part in parts:
            part.grad = None
        q, k, v = (part.transpose(1, 2) for part in parts)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()[None]

    return call
