"""What a training step needs of an engine, and `LocalEngine`: plain PyTorch on one process.

An engine holds the network's fp32 master weights and optimizer moments as flat `Partition`s. Which ranges of which
parameters lie in a partition is all that checkpoints and the EMA need to know of ZeRO stages and world sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as tdist
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from stack import dist
from stack.config import Config, UserError
from stack.nn.linear import decay_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient over all parameters."""


class ParallelConfig(Config):
    engine: Literal["local", "zero"] = "local"
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Stage 0 has no fp32 partitions beside bf16 weights and needs precision fp32."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. Master weights and moments are always fp32."""
    accumulate: PositiveInt = 1
    """Micro-batches a step."""

    def dtype(self, device: torch.device) -> torch.dtype:
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


class Range(NamedTuple):
    """Elements start…stop of the flattened parameter `name`, which lie at `offset` of their partition."""

    name: str
    start: int
    stop: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.stop - self.start)


@dataclass
class Partition:
    """A tensor that the optimizer steps on this rank.

    key: the fp32 tensor as the optimizer knows it. owned: whether this rank saves it (where several ranks hold the
    same partition, one owns it).
    """

    key: Tensor
    ranges: list[Range]
    owned: bool = True

    @property
    def master(self) -> Tensor:
        return self.key.detach().view(-1)


class StepInfo(NamedTuple):
    applied: bool
    """False where the gradient was not finite on some rank: nothing was changed on any."""
    grad_norm: float


class Engine(Protocol):
    network: nn.Module
    """Call it for the forward pass."""
    dtype: torch.dtype
    partitions: list[Partition]
    shapes: dict[str, torch.Size]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that steps the partitions."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""

    def step(self, lr: float) -> StepInfo:
        """Clip and apply the mean gradient over micro-batches and ranks."""

    def refresh(self) -> None:
        """Bring the network's working weights up to date with master weights that were written to."""


def moments(engine: Engine, partition: Partition) -> dict[str, Tensor]:
    """The flat optimizer moments of a partition, made as zeros before the first step."""
    state = engine.optimizer.state[partition.key]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=partition.key.device)
        state.update({name: torch.zeros_like(partition.key) for name in MOMENTS})
    return {name: state[name].view(-1) for name in MOMENTS}


def gather(engine: Engine, flats: Iterable[tuple[Partition, Tensor]]) -> dict[str, Tensor] | None:
    """Whole parameters on rank 0's CPU (None elsewhere), from each rank's owned (partition, flat tensor) pairs."""
    pieces = [(r.name, r.start, r.of(flat).float()) for partition, flat in flats for r in partition.ranges]
    layout = dist.all_gather([(name, start, piece.numel()) for name, start, piece in pieces])
    own = torch.cat([piece for *_, piece in pieces]) if pieces else torch.empty(0, device=dist.device())
    if dist.rank() != 0:
        if pieces:
            tdist.send(own, dst=0)
        return None
    whole = {name: torch.empty(shape.numel()) for name, shape in engine.shapes.items()}
    for source, ranges in enumerate(layout):
        flat = own if source == 0 else own.new_empty(sum(count for *_, count in ranges))
        if source > 0 and ranges:
            tdist.recv(flat, src=source)
        position = 0
        for name, start, count in ranges:
            whole[name][start : start + count] = flat[position : position + count].cpu()
            position += count
    return {name: flat.view(engine.shapes[name]) for name, flat in whole.items()}


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips by the global norm and leaves everything as it was where that norm is not finite.

    `overflow` and `_global_grad_norm` are the names under which DeepSpeed asks its optimizers for these.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig):
        super().__init__(groups, **adamw_arguments(config))
        self._clip = config.clip
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not torch.isfinite(norm).item()
        if not self.overflow:
            self.grad_scale = (norm / self._clip).clamp(min=1).float()  # the fused kernel divides as it reads
            self.found_inf = torch.zeros_like(self.grad_scale)
            super().step()


def adamw_arguments(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}


def parameter_groups(network: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, as the network's modules tagged their parameters."""
    groups = zip(decay_groups(network), (config.weight_decay, 0.0), strict=True)
    return [{"params": [p for _, p in named], "weight_decay": decay} for named, decay in groups if named]


class LocalEngine:
    """One process, no DeepSpeed. In bf16 the working weights are copies of fp32 masters, as under ZeRO."""

    def __init__(self, network: nn.Module, optim: OptimConfig, parallel: ParallelConfig, device: torch.device):
        if dist.world_size() > 1:
            raise UserError(f"parallel.engine=local runs on one process, not {dist.world_size()}: use zero")
        self.dtype = parallel.dtype(device)
        self.network = network.to(device=device, dtype=self.dtype)
        self.shapes = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
        self._working = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._masters = self._working
        groups = parameter_groups(network, optim)
        if self.dtype != torch.float32:
            self._masters = {name: nn.Parameter(p.detach().float()) for name, p in self._working.items()}
            master_of = {id(p): self._masters[name] for name, p in self._working.items()}
            groups = [{**group, "params": [master_of[id(p)] for p in group["params"]]} for group in groups]
        self.optimizer = GuardedAdamW(groups, optim)
        self.partitions = [Partition(p, [Range(name, 0, p.numel(), 0)]) for name, p in self._masters.items()]
        self._accumulate = parallel.accumulate

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulate).backward()

    def step(self, lr: float) -> StepInfo:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._masters is not self._working:
            for name, p in self._working.items():
                self._masters[name].grad = p.grad.float() if p.grad is not None else None
        self.optimizer.step()
        self.network.zero_grad(set_to_none=True)
        self.refresh()
        return StepInfo(not self.optimizer.overflow, self.optimizer._global_grad_norm)

    def refresh(self) -> None:
        if self._masters is not self._working:
            with torch.no_grad():
                torch._foreach_copy_(list(self._working.values()), list(self._masters.values()))


def build(network: nn.Module, optim: OptimConfig, parallel: ParallelConfig, micro_batch_size: int) -> Engine:
    """The engine that `parallel` names, on this process's device. micro_batch_size: samples a rank and micro-batch."""
    if parallel.engine == "local":
        return LocalEngine(network, optim, parallel, dist.device())
    from stack.parallel.zero import ZeroEngine

    return ZeroEngine(network, optim, parallel, micro_batch_size, dist.device())
