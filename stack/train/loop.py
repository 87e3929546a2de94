"""The training loop: fetch, accumulate, step, log, snapshot, checkpoint, preempt. There is one, and it is all here."""

from __future__ import annotations

import copy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import ShardData
from stack.flow.noise import NoisePlan
from stack.log import Metrics, progress, publish, say
from stack.parallel import engine as engines
from stack.parallel.ema import Ema
from stack.train import snapshot
from stack.train.checkpoint import Checkpoints
from stack.train.guard import Guard
from stack.train.objective import Objective
from stack.train.preempt import Preemption
from stack.train.recipe import TrainConfig, build
from stack.train.schedule import learning_rate, steps_of


def train(config: TrainConfig) -> bool:
    """Run or go on with the training that `config` describes. False if it was asked to stop before its last step.

    Needs the process group (`stack.dist.init`). Raises UserError for what the user can mend, NonFiniteError.
    """
    run, seed, size = config.run.dir, config.run.seed, config.data.batch_size
    accumulate, device = config.parallel.accumulate, dist.device()
    total = steps_of(config.schedule.steps, size)
    save_every, snapshot_every = steps_of(config.checkpoint.every, size), steps_of(config.snapshot.every, size)
    keep_every = steps_of(config.checkpoint.keep_every or 0, size)
    if size % (dist.world_size() * accumulate):
        raise UserError(
            f"data.batch_size={size} is not divisible by {dist.world_size()} ranks × {accumulate} micro-batches"
        )
    _claim(run, config)

    data, objective = build(config, device)
    averaged = copy.deepcopy(objective.network) if dist.rank() == 0 else None
    engine = engines.build(objective.network, config.optim, config.parallel, size // dist.world_size() // accumulate)
    ema = Ema(engine, config.ema)
    noise = NoisePlan(seed)

    checkpoints = Checkpoints(run, config.checkpoint, keep_every)
    state = checkpoints.newest()
    if state is not None:
        checkpoints.load(state, engine, ema)
        say(f"{run}: going on after step {state['step']}")
    state = state or {"step": 0, "skipped": 0, "in_a_row": 0, "sums": {}, "wandb": None}
    start = state["step"]
    guard = Guard(config.run.max_nonfinite, state["skipped"], state["in_a_row"])
    sums = defaultdict(float, state["sums"])
    metrics = Metrics(run, config.log, start, state["wandb"], config.model_dump(mode="json"))
    batches = iter(data.loader(start, total, dist.rank(), dist.world_size(), accumulate))

    with Preemption() as preemption, progress(run.name, total, "step", start) as advance:
        tick = time.perf_counter()
        for step in range(start, total):
            lr = learning_rate(config.schedule, config.optim.lr, step, size)
            keys: list[str] = []
            for _ in range(accumulate):
                waiting = time.perf_counter()
                batch = next(batches)
                sums["data_wait_s"] += time.perf_counter() - waiting
                keys += batch.keys
                losses = objective.loss(engine.network, batch.to(device), noise.at(batch.step, batch.positions))
                engine.backward(losses.total)
                for name, value in {"loss": losses.total, **losses.terms}.items():
                    sums[name] += float(value.detach()) / accumulate
            info = engine.step(lr)
            if info.applied:
                ema.update(step + 1 - guard.skipped)
            guard.check(info.applied, step, keys)
            sums["steps"] += 1

            done = step + 1
            if done % config.log.every == 0 or done == total:
                now = time.perf_counter()
                line = _summary(sums, info, lr, done, size, now - tick)
                metrics.write({**line, "epoch": data.plan.epoch_of(step), "skipped": guard.skipped})
                tick = now
                sums.clear()
                advance(0, f"loss {line['loss']:.4f}")
            if done % snapshot_every == 0 or done == total:
                weights = ema.gathered()
                if averaged is not None and weights is not None:
                    metrics.write(_publish(run, done, objective, data, averaged.to(device), weights))
                dist.barrier()
            stop = preemption.agreed()
            if done % save_every == 0 or done == total or stop:
                kept: dict[str, Any] = {
                    "samples": done * size,
                    "world_size": dist.world_size(),
                    "wandb": metrics.run_id,
                }
                kept |= {"skipped": guard.skipped, "in_a_row": guard.in_a_row, "sums": dict(sums)}
                kept |= {"engine": config.parallel.engine, "zero_stage": config.parallel.zero_stage}
                checkpoints.save(done, engine, ema, {**kept, "config": configuration.fingerprint(config)})
            advance(1)
            if stop and done < total:
                say(f"{run}: asked to stop, saved after step {done}; the same command goes on from there")
                metrics.close()
                return False
    metrics.close()
    return True


def _claim(run: Path, config: TrainConfig) -> None:
    """Write the resolved configuration into the run; refuse a folder that holds a run of another model or data."""
    problem = ""
    if dist.rank() == 0:
        path = run / "config.yaml"
        if path.exists():
            known = configuration.load(TrainConfig, path)
            fixed = ("data", "objective", "optim", "schedule", "ema")
            changed = [name for name in fixed if getattr(known, name) != getattr(config, name)]
            if known.run.seed != config.run.seed:
                changed.append("run.seed")
            if changed:
                problem = f"{path} differs in {', '.join(changed)}: give run.dir a new folder, or restore these values"
        if not problem:
            with publish(path) as temporary:
                temporary.write_text(configuration.dump(config))
    problem = dist.broadcast(problem)
    if problem:
        raise UserError(problem)


def _summary(
    sums: dict[str, float], info: engines.StepInfo, lr: float, done: int, size: int, seconds: float
) -> dict[str, Any]:
    """One line of metrics: means over the steps since the last line and over ranks."""
    count = sums.pop("steps")
    names = sorted(sums)
    means = dict(zip(names, dist.mean([sums[name] / count for name in names]), strict=True))
    # After a resume, `count` includes steps whose time was spent before it.
    return {
        "step": done,
        "samples": done * size,
        **means,
        "lr": lr,
        "grad_norm": info.grad_norm,
        "step_s": seconds / count,
        "samples_per_s": size * count / seconds,
        "rss_gb": psutil.Process().memory_info().rss / 2**30,
    }


def validation_loss(objective: Objective, network: nn.Module, data: ShardData, batch_size: int = 64) -> float:
    """Mean loss over the held-out samples, on noise that depends on a sample's place in the set alone."""
    losses: list[torch.Tensor] = []
    draws = NoisePlan(0)
    with torch.inference_mode():
        for batch in data.validation(batch_size):
            batch = batch.to(dist.device())
            losses.append(objective.validate(network, batch, draws.at(0, batch.positions)).double().cpu())
    return float(torch.cat(losses).mean()) if losses else float("nan")


def _publish(
    run: Path, done: int, objective: Objective, data: ShardData, network: nn.Module, weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Rank 0: write the snapshot, look at it (validation loss, picture), and return its line of metrics."""
    snapshot.write(run, done, weights, objective.metadata())
    network.load_state_dict(weights)
    network.eval()
    value = validation_loss(objective, network, data)
    with torch.inference_mode(), publish(run / "samples" / f"{done:08d}.png") as temporary:
        objective.preview(network).save(temporary, format="png")
    if sys.stderr.isatty():
        say(f"step {done}: validation loss {value:.4f}")
    return {"step": done, "val_loss": value}
