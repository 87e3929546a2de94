"""The process group: who am I, and the few collectives that the stack uses.

A launcher sets the five variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT before `init`. `init` adds
those that follow from the others, and refuses what is left.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from random import SystemRandom
from typing import Any, TypeVar

import torch
import torch.distributed as tdist

from stack.config import UserError

T = TypeVar("T")

_num_barriers = 0
_alone: dict[str, str] = {}  # variables that `init` set for a process without a launcher
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """A port that nobody listens on, of those that the system gives to no outgoing connection: seconds pass before a
    rank listens on it, in which another process would get a port of the ephemeral range."""
    draw = SystemRandom()
    while True:
        port = draw.randrange(10_000, 30_000)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def single_process() -> dict[str, str]:
    """The five variables of a process that is alone."""
    values = ("0", "1", "0", "127.0.0.1", str(free_port()))
    return dict(zip(VARIABLES, values, strict=True))


def init(timeout_minutes: float = 30) -> None:
    """Join the process group named by the environment (gloo on a CPU, nccl on GPUs)."""
    if tdist.is_initialized():
        return
    _alone.update(_missing_variables())
    os.environ.update(_alone)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "nccl" if device().type == "cuda" else "gloo"
    tdist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def _missing_variables() -> dict[str, str]:
    """The variables that follow from those that are set. Raises UserError where they are not enough, or not numbers."""
    given = {name: value for name in VARIABLES if (value := os.environ.get(name))}
    size = _whole("WORLD_SIZE", 1)
    if "RANK" not in given and size == 1:
        alone = single_process()
        return {name: alone[name] for name in VARIABLES if name not in given}
    needed = {"RANK", "WORLD_SIZE"} if size == 1 else set(VARIABLES) - {"LOCAL_RANK"}
    if missing := sorted(needed - given.keys()):
        raise UserError(
            f"{', '.join(sorted(given))} set, but not {', '.join(missing)}: set all of {', '.join(VARIABLES)}, or none"
        )
    if _whole("RANK") >= size:
        raise UserError(f"RANK={given['RANK']} with WORLD_SIZE={size}: expected a RANK of 0 … {size - 1}")
    if "MASTER_PORT" in given and not 0 < _whole("MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT={given['MASTER_PORT']}: expected a port of 1 … 65535")
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **given}
    if "LOCAL_RANK" not in given:
        gpus = torch.cuda.device_count()
        if size > 1 and gpus > 1 and "SLURM_LOCALID" not in os.environ:
            raise UserError(f"LOCAL_RANK is not set: which of this machine's {gpus} GPUs is rank {given['RANK']}'s?")
        found["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0") if size > 1 else "0"
    return {name: value for name, value in found.items() if name not in given}


def _whole(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text}: expected a whole number")
    return int(text)


def shutdown() -> None:
    """Leave the process group, and take back what `init` set in the environment."""
    global _num_barriers
    _num_barriers = 0
    if tdist.is_initialized():
        tdist.destroy_process_group()
    while _alone:
        os.environ.pop(_alone.popitem()[0], None)


def rank() -> int:
    return tdist.get_rank() if tdist.is_initialized() else 0


def world_size() -> int:
    return tdist.get_world_size() if tdist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among those of its node."""
    return _whole("LOCAL_RANK", 0)


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        if (number := local_rank()) >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK={number}, but this process sees {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", number)
    return torch.device("cpu")


def frozen_dtype(device: torch.device) -> torch.dtype:
    """What frozen networks compute in that see every sample: in pre-encoding, or as the autoencoder of a training."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def barrier() -> None:
    """Return when all ranks have called this.

    The others wait for rank 0 without a time limit: it may index 100,000 shards first. Only then does the time limit of
    collectives begin. If rank 0 dies, so does the store that it serves, which ends the others.
    """
    global _num_barriers
    if world_size() == 1:
        return
    _num_barriers += 1
    store, key = tdist.distributed_c10d._get_default_store(), f"mmdit/barrier/{_num_barriers}"
    if rank() == 0:
        store.set(key, "reached")
    pause = 0.001
    while rank() != 0 and not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    tdist.barrier()


def mean(values: list[float]) -> list[float]:
    """The mean over ranks of each value (float64, so that order of ranks is all that can matter)."""
    if world_size() == 1:
        return values
    buffer = torch.tensor(values, dtype=torch.float64, device=device())
    tdist.all_reduce(buffer)
    return (buffer / world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """True on all ranks if `flag` is true on one."""
    if world_size() == 1:
        return flag
    buffer = torch.tensor([int(flag)], device=device())
    tdist.all_reduce(buffer, op=tdist.ReduceOp.MAX)
    return bool(buffer.item())


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    tdist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def on_first_rank(call: Callable[[], T]) -> T:
    """What `call` returns on rank 0, on every rank; all others wait. A UserError or OSError of it is raised on all."""
    result: T | None = None
    problem: Exception | None = None
    if rank() == 0:
        try:
            result = call()
        except (UserError, OSError) as error:
            problem = error
    barrier()  # which waits for rank 0 without a time limit
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise problem
    return result


def side_group() -> tdist.ProcessGroup | None:
    """All ranks once more, on the CPU, for a thread that gathers beside the training. A collective."""
    if world_size() == 1:
        return None
    group = tdist.new_group(backend="gloo")
    assert isinstance(group, tdist.ProcessGroup)
    return group


def all_gather(value: Any, group: tdist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    tdist.all_gather_object(box, value, group=group)
    return box
