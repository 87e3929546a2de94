"""The rows of the checkpoints' benchmark.

python checkpoint_rows.py FOLDER SIZE LAYERS      one of two ranks: writes what the last row resumes from
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pairs import Row, side_by_side
from peers import Pass
from torch import nn

PAIRS = 7
UNIT = "calls/s"
Peer = tuple[Callable[[], Any], Callable[[Any], object]]
"""A save, and what waits for the end of what it returned."""


def network_of(size: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))


def timed_beside(
    call: Callable[[], Any], step: Callable[[], None], settle: Callable[[], object], after: Callable[[Any], object]
) -> Callable[[], Pass]:
    """The time by which `call` lengthens a training: `call`, `step` and `settle`, less a `step` of its own before."""

    def once() -> Pass:
        alone = timed_call(step, lambda _: None)()

        def both() -> Any:
            result = call()
            step()
            settle()
            return result

        taken = timed_call(both, after)()
        return Pass(max(taken.seconds - alone.seconds, 1e-4), taken.processor - alone.processor)

    return once


def timed_call(call: Callable[[], Any], after: Callable[[Any], object]) -> Callable[[], Pass]:
    """Times `call` and gives what it returns to `after`, which is not timed."""

    def once() -> Pass:
        began, processor = time.perf_counter(), time.process_time()
        result = call()
        taken = Pass(time.perf_counter() - began, time.process_time() - processor)
        after(result)
        return taken

    return once


class Benchmark:
    def __init__(self, quick: bool):
        self._quick = quick
        self._folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))

    @cached_property
    def rows(self) -> dict[str, Callable[[str], Row]]:
        return {
            "stall of a save / dcp.async_save": partial(self._stall, self._dcp, 3.0),
            "stall of a save / dcp.async_save, stager reused": partial(self._stall, self._dcp_with_stager, 1.8),
            "stall of a save / torch.save": partial(self._stall, self._torch_save, 5.0),
            "resume of 2 ranks' on 1 / ds_to_universal": self._resume,
        }

    def run(self, name: str) -> Row:
        return self.rows[name](name)

    def close(self) -> None:
        from stack import dist

        dist.shutdown()
        shutil.rmtree(self._folder)

    @property
    def _size(self) -> tuple[int, int]:
        """Width and layers: 50 million parameters, .8 GB of state."""
        return (64, 2) if self._quick else (2048, 12)

    @property
    def _pairs(self) -> int:
        return 1 if self._quick else PAIRS

    # ---- the stall of a save

    def _stall(self, peer: Callable[[dict[str, Any]], Peer], target: float, name: str) -> Row:
        from stack import dist
        from stack.parallel.ema import Ema, EmaConfig
        from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig, moments
        from stack.train.checkpoint import CheckpointConfig, Checkpoints

        dist.init()  # dcp needs a process group
        network = network_of(*self._size)
        engine = LocalEngine(network, OptimConfig(), ParallelConfig(), torch.device("cpu"))
        ema = Ema(engine, EmaConfig())
        state = {
            "model": network.state_dict(),
            "optimizer": [moments(engine, partition) for partition in engine.partitions],
            "ema": [shadow for _, shadow in ema.pairs],
        }
        ours = Checkpoints(self._folder / "ours", CheckpointConfig())

        def published(_: object) -> None:
            if not ours.wait():
                raise RuntimeError("the checkpoint was not published")

        x = torch.randn(64, self._size[0])

        def step() -> None:
            network(x).square().mean().backward()
            network.zero_grad()

        save = timed_beside(lambda: ours.save(1, engine, ema, {}), step, ours.settle, published)
        call, finish = peer(state)
        theirs = timed_beside(call, step, lambda: None, finish)
        return side_by_side(name, save, theirs, 1, UNIT, target, self._pairs)

    def _dcp(self, state: dict[str, Any]) -> Peer:
        import torch.distributed.checkpoint as dcp

        path = self._folder / "dcp"
        return partial(dcp.async_save, state, checkpoint_id=path), lambda future: future.result()

    def _dcp_with_stager(self, state: dict[str, Any]) -> Peer:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stager = DefaultStager(StagingOptions(False, True, False, False))  # what of it runs without a GPU
        path = self._folder / "dcp"
        save = partial(dcp.async_save, state, checkpoint_id=path, async_stager=stager)
        return save, lambda future: future.result()

    def _torch_save(self, state: dict[str, Any]) -> Peer:
        return partial(torch.save, state, self._folder / "state.pt"), lambda _: None

    # ---- resuming

    def _resume(self, name: str) -> Row:
        from stack import dist

        written = self._folder / "ranks"
        self._write_on_two_ranks(written)
        dist.init()
        ours, peer = _our_resume(written, self._size), _their_resume(written, self._size)
        return side_by_side(name, ours, peer, 1, UNIT, 3.0, self._pairs)

    def _write_on_two_ranks(self, folder: Path) -> None:
        from stack.dist import VARIABLES, free_port

        port = str(free_port())
        command = [sys.executable, __file__, str(folder), *map(str, self._size)]
        ranks = []
        for rank in ("0", "1"):
            group = dict(zip(VARIABLES, (rank, "2", rank, "127.0.0.1", port), strict=True))
            environment = {**os.environ, **group, "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        errors = [rank.communicate()[1].decode() for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError("\n".join(errors))


def _our_resume(written: Path, size: tuple[int, int]) -> Callable[[], Pass]:
    """The newest checkpoint verified, and loaded."""
    from stack import dist
    from stack.parallel.ema import Ema, EmaConfig
    from stack.parallel.engine import OptimConfig, ParallelConfig
    from stack.parallel.zero import ZeroEngine
    from stack.train.checkpoint import CheckpointConfig, Checkpoints

    engine = ZeroEngine(network_of(*size), OptimConfig(), ParallelConfig(), 1, dist.device())
    ema = Ema(engine, EmaConfig())
    store = Checkpoints(written, CheckpointConfig())

    def resume() -> None:
        record = store.newest()
        assert record is not None
        store.load(record, engine, ema)

    return timed_call(resume, lambda _: None)


def _their_resume(written: Path, size: tuple[int, int]) -> Callable[[], Pass]:
    """DeepSpeed's own checkpoint converted by its command and loaded. It holds no average of the weights."""
    import deepspeed

    from stack.parallel.engine import OptimConfig, ParallelConfig, parameter_groups
    from stack.parallel.zero import deepspeed_config

    network, universal = network_of(*size), written / "universal"
    optimizer = torch.optim.AdamW(parameter_groups(network, OptimConfig()))
    config = deepspeed_config(OptimConfig(), ParallelConfig(), 1, False)
    config["checkpoint"] = {"load_universal": True}
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(written / "deepspeed" / "step"), "--output_folder", str(universal / "step")]

    def resume() -> None:
        subprocess.run(command, check=True, capture_output=True)
        path, _ = engine.load_checkpoint(str(universal), tag="step")
        assert path is not None

    return timed_call(resume, lambda _: shutil.rmtree(universal))


def write(folder: Path, size: int, layers: int) -> None:
    """One rank: a step of ZeRO-2, and both kinds of checkpoint."""
    from stack import dist
    from stack.parallel.ema import Ema, EmaConfig
    from stack.parallel.engine import OptimConfig, ParallelConfig
    from stack.parallel.zero import ZeroEngine
    from stack.train.checkpoint import CheckpointConfig, Checkpoints

    dist.init()
    engine = ZeroEngine(network_of(size, layers), OptimConfig(), ParallelConfig(), 1, dist.device())
    ema = Ema(engine, EmaConfig())
    engine.backward(engine.network(torch.randn(2, size)).square().mean())
    engine.step(1e-3)
    store = Checkpoints(folder, CheckpointConfig())
    store.save(1, engine, ema, {})
    if not store.wait():
        raise RuntimeError("the checkpoint was not published")
    engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="step", save_latest=False)
    dist.shutdown()


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
