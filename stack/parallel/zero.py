"""`ZeroEngine`: DeepSpeed ZeRO 0–3 (Rajbhandari et al., arXiv 1910.02054). The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stack import dist
from stack.config import UserError
from stack.parallel.engine import (
    GuardedAdamW,
    OptimConfig,
    ParallelConfig,
    Partition,
    Range,
    StepInfo,
    adamw_arguments,
    parameter_groups,
)


def deepspeed_config(optim: OptimConfig, parallel: ParallelConfig, micro_batch_size: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours so that batch size and clipping are said once.

    The learning rate and the optimizer are not in it: the optimizer is ours and the loop sets its rate.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": parallel.accumulate,
        "gradient_clipping": optim.clip if parallel.zero_stage > 0 else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": {"stage": parallel.zero_stage, "overlap_comm": False},
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, joined to the process group that exists, without what it would look for, say or compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "30")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # C++ compiled on first use, for inference only
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class ZeroEngine:
    """A network under DeepSpeed, with its optimizer's flat partitions laid open."""

    def __init__(
        self,
        network: nn.Module,
        optim: OptimConfig,
        parallel: ParallelConfig,
        micro_batch_size: int,
        device: torch.device,
    ):
        deepspeed = _import_deepspeed(device)
        self.dtype = parallel.dtype(device)
        self._stage = parallel.zero_stage
        bf16 = self.dtype == torch.bfloat16
        if bf16 and self._stage == 0:
            raise UserError(
                "parallel.zero_stage=0 with bf16 has no fp32 partitions: use zero_stage=1 or precision=fp32"
            )
        network = network.to(device)
        self.shapes = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
        groups = parameter_groups(network, optim)
        optimizer: torch.optim.Optimizer
        if self._stage == 0:
            optimizer = GuardedAdamW(groups, optim)
        else:
            optimizer = torch.optim.AdamW(groups, **adamw_arguments(optim))
        config = deepspeed_config(optim, parallel, micro_batch_size, bf16)
        self._engine, self._zero, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
        self.network: nn.Module = self._engine
        self.optimizer = optimizer
        self.partitions = {0: self._whole, 1: self._flat, 2: self._flat, 3: self._sharded}[self._stage]()

    def _named(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad]

    def _whole(self) -> list[Partition]:
        """Stage 0: every rank steps whole parameters; ranks take turns in owning them."""
        ranks = dist.world_size()
        return [
            Partition(p, [Range(name, 0, p.numel(), 0)], owned=i % ranks == dist.rank())
            for i, (name, p) in enumerate(self._named())
        ]

    def _flat(self) -> list[Partition]:
        """Stages 1 and 2: one flat slice a parameter group; `_hp_mapping` says which piece of a parameter is in it."""
        partitions = [Partition(flat, []) for flat in self._zero.single_partition_of_fp32_groups]
        for name, p in self._named():
            mapping = p._hp_mapping
            if mapping is not None:
                piece, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                partitions[mapping.param_group_index].ranges.append(
                    Range(name, piece.start, piece.start + piece.numel, place.start)
                )
        return partitions

    def _sharded(self) -> list[Partition]:
        """Stage 3: an even slice of each parameter, the last one padded at its end."""
        partitions = [Partition(flat, []) for flat in self._zero.fp32_partitioned_groups_flat]
        for name, p in self._named():
            group, offset, count = self._zero.grad_position[self._zero.get_param_id(p)]
            start = min(count * dist.rank(), p.ds_numel)
            stop = min(start + count, p.ds_numel)
            if stop > start:
                partitions[group].ranges.append(Range(name, start, stop, offset))
        return partitions

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> StepInfo:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepInfo(self._engine.was_step_applied(), float(norm) if norm is not None else float("nan"))

    def refresh(self) -> None:
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
