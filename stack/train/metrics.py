"""A run's lines of metrics: running sums of every rank, and what they say when a line is due."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from stack import dist
from stack.log import say
from stack.models.flops import peak_tflops
from stack.parallel.engine import StepInfo
from stack.train.objective import Losses

NUM_BINS = 4
"""Of the timestep, each as wide as the others: loss_t0 is of t in [0, 1/4)."""
SLOW = 1.5
"""A rank is a straggler when its own work takes so many times the median of all ranks, in PATIENCE lines in a row."""
PATIENCE = 3


class Stopwatch:
    """Seconds of this rank's own work, which waits for no other rank but under ZeRO-3: `start` … `stop`, added up by
    `total`.

    On a GPU what is timed are its kernels, by events that are read when the total is.
    """

    def __init__(self) -> None:
        self._cuda = dist.device().type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._spans.append((self._began, self._now()))

    def total(self) -> float:
        """Seconds since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
            seconds = sum(began.elapsed_time(ended) for began, ended in self._spans) / 1e3
        else:
            seconds = sum(ended - began for began, ended in self._spans)
        self._spans.clear()
        return seconds


class Sums:
    """This rank's sums since the last line, which are part of a checkpoint."""

    def __init__(self, of_ranks: list[dict[str, float]] | None = None):
        """of_ranks: a checkpoint's. After a change of the number of ranks each goes on from the mean of all."""
        self.values: defaultdict[str, float] = defaultdict(float)
        self.own = Stopwatch()
        self._slow = (0, 0)  # the last straggler, and in how many lines in a row it was one
        if of_ranks and len(of_ranks) == dist.world_size():
            self.values.update(of_ranks[dist.rank()])
        elif of_ranks:
            self.values.update({name: sum(s[name] for s in of_ranks) / len(of_ranks) for name in of_ranks[0]})

    def add(self, name: str, value: float) -> None:
        self.values[name] += value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds that the `with` block takes."""
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add_losses(self, losses: Losses, accumulate: int) -> None:
        """Of one of `accumulate` micro-batches."""
        for name, value in {"loss": losses.total, **losses.terms}.items():
            self.add(name, float(value.detach()) / accumulate)
        if losses.flop is not None:
            self.add("tflop", losses.flop / 1e12)
        if losses.by_time is not None:
            self._add_bins(*losses.by_time)

    def _add_bins(self, error_B: Tensor, t_B: Tensor) -> None:
        bin_B = (t_B * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        sums, counts = (torch.zeros(NUM_BINS, dtype=torch.float64, device=bin_B.device) for _ in range(2))
        sums.index_add_(0, bin_B, error_B.detach().double())
        counts.index_add_(0, bin_B, torch.ones_like(bin_B, dtype=torch.float64))
        for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            self.add(f"sum_t{i}", total)
            self.add(f"count_t{i}", count)

    def state(self) -> dict[str, float]:
        self.add("own_s", self.own.total())
        return dict(self.values)

    def line(self, info: StepInfo, lr: float, done: int, size: int) -> dict[str, Any]:
        """One line of metrics: means over the steps since the last one and over ranks. A collective; begins anew."""
        sums = self.state()
        steps = sums.pop("steps")
        names = sorted(sums)
        means = dict(zip(names, dist.mean([sums[name] / steps for name in names]), strict=True))
        bins = {i: (means.pop(f"sum_t{i}", 0.0), means.pop(f"count_t{i}", 0.0)) for i in range(NUM_BINS)}
        line: dict[str, Any] = {"step": done, "samples": done * size, **means, "lr": lr, "grad_norm": info.grad_norm}
        line |= {f"loss_t{i}": total / count for i, (total, count) in bins.items() if count}
        line["samples_per_s"] = size / line["step_s"]
        if "tflop" in line:
            line["tflops_per_s"] = line.pop("tflop") / line["step_s"]
            if peak := peak_tflops(dist.device()):
                line["mfu"] = line["tflops_per_s"] / peak
        line |= self._straggler(sums["own_s"] / steps)
        line["rss_gb"] = psutil.Process().memory_info().rss / 1e9
        if dist.device().type == "cuda":
            line["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.values.clear()
        return line

    def _straggler(self, own_s: float) -> dict[str, Any]:
        """The slowest rank, which is named where it goes on holding up the others."""
        if dist.world_size() == 1:
            return {}
        of_ranks = dist.all_gather((own_s, socket.gethostname()))
        seconds = [own for own, _ in of_ranks]
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        median = sorted(seconds)[(len(seconds) - 1) // 2]
        if seconds[rank] > SLOW * median:
            self._slow = (rank, self._slow[1] + 1 if self._slow[0] == rank else 1)
            if self._slow[1] == PATIENCE:
                say(f"rank {rank} on {of_ranks[rank][1]} is slow: {seconds[rank]:.3f} s a step, median {median:.3f} s")
        else:
            self._slow = (0, 0)
        return {"slowest_rank": rank, "slowest_own_s": seconds[rank]}
