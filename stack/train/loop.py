"""The training loop: fetch, accumulate, step, log, snapshot, checkpoint, preempt. There is one, and it is all here."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stack import config as configuration
from stack import dist
from stack.config import UserError
from stack.data.dataset import ShardData
from stack.data.plan import check_division
from stack.data.safety import RejectLog
from stack.files import lock, publish
from stack.flow.noise import NoisePlan
from stack.log import Metrics, progress, say
from stack.models.compute import configure
from stack.parallel import engine as engines
from stack.parallel.ema import Ema
from stack.train import identity, snapshot
from stack.train.checkpoint import Checkpoints
from stack.train.guard import Guard
from stack.train.metrics import Sums
from stack.train.objective import Objective
from stack.train.preempt import Preemption
from stack.train.recipe import TrainConfig, build, check
from stack.train.schedule import learning_rate, steps_of
from stack.train.watchdog import Watchdog


def train(config: TrainConfig) -> bool:
    """Run or go on with the training that `config` describes. False if it was asked to stop before its last step.

    Needs the process group (`stack.dist.init`). Raises UserError for what the user can mend, NonFiniteError.
    """
    run, seed, size = config.run.dir, config.run.seed, config.data.batch_size
    accumulate, device = config.parallel.accumulate, dist.device()
    check(config, device)
    total = steps_of(config.schedule.steps, size)
    save_every, snapshot_every = steps_of(config.checkpoint.every, size), steps_of(config.snapshot.every, size)
    keep_every = steps_of(config.checkpoint.keep_every, size) if config.checkpoint.keep_every else 0
    with _sole_user(run):
        checkpoints = Checkpoints(run, config.checkpoint, keep_every)
        state = checkpoints.newest()
        identity.check_settings(run, config, state)
        data, objective = _build(config, device, state)
        encoders = objective.metadata().get("encoders")
        init = identity.check_inputs(run, config, state, encoders)
        check_division(size, dist.world_size(), accumulate)
        averaged = copy.deepcopy(objective.network) if dist.rank() == 0 else None
        configure(objective.network, config.compute)  # not the copy, which computes as readers of snapshots do
        micro_batch_size = size // dist.world_size() // accumulate
        engine = engines.build(objective.network, config.optim, config.parallel, micro_batch_size)
        ema = Ema(engine, config.ema)
        noise = NoisePlan(seed)
        checkpoints.check_space(engine, ema)
        _write_config(run, config)
        identity.write(run, data.identity)

        if state is not None:
            checkpoints.load(state, engine, ema)
            say(f"{run}: going on after step {state['step']}")
        start = state["step"] if state else 0
        guard = Guard(config.run.max_nonfinite, *((state["skipped"], state["in_a_row"]) if state else (0, 0)))
        sums = Sums(state["sums"] if state else None)
        metrics = Metrics(run, config.log, start, state["wandb"] if state else None, configuration.public(config))
        batches = iter(data.loader(start, total, dist.rank(), dist.world_size(), accumulate))

        listening, watching = Preemption(), Watchdog(config.run.watchdog_s)
        with listening as preemption, watching as watchdog, progress(run.name, total, "step", start) as advance:
            for step in range(start, total):
                began = time.perf_counter()
                lr = learning_rate(config.schedule, config.optim.lr, step, size)
                keys: list[str] = []
                for _ in range(accumulate):
                    sums.own.start()
                    with sums.timed("data_wait_s"):
                        batch = next(batches)
                    keys += batch.keys
                    losses = objective.loss(engine.network, batch.to(device), noise.at(batch.step, batch.positions))
                    sums.own.stop()
                    engine.backward(losses.total)
                    sums.add_losses(losses, accumulate)
                with sums.timed("checkpoint_stall_s"):
                    checkpoints.settle()
                info = engine.step(lr)
                if info.applied:
                    ema.update(step + 1 - guard.skipped)
                guard.check(info.applied, step, keys)
                metrics.write_keys(step + 1, keys)
                sums.add("step_s", time.perf_counter() - began)
                sums.add("steps", 1)

                done = step + 1
                advance(1)
                if done % config.log.every == 0 or done == total:
                    line = sums.line(info, lr, done, size)
                    metrics.write({**line, "epoch": data.plan.epoch_of(step), "skipped": guard.skipped})
                    advance(0, f"loss {line['loss']:.4f}")
                if done % snapshot_every == 0 or done == total:
                    weights = ema.gathered()
                    if averaged is not None and weights is not None:
                        metrics.write(_publish(run, done, objective, data, averaged.to(device), weights))
                        snapshot.retire(run, done, config.snapshot, size)
                    dist.barrier()
                stop = preemption.agreed()
                if done % save_every == 0 or done == total or stop:
                    with sums.timed("checkpoint_stall_s"):
                        metrics.sync()
                        kept: dict[str, Any] = {"samples": done * size, "sums": dist.all_gather(sums.state())}
                        kept |= {"skipped": guard.skipped, "in_a_row": guard.in_a_row, "wandb": metrics.run_id}
                        kept |= {"engine": config.parallel.engine, "zero_stage": config.parallel.zero_stage}
                        kept |= {"encoders": encoders, "data": data.identity.fingerprint, "init": init}
                        checkpoints.save(done, engine, ema, {**kept, "config": configuration.fingerprint(config)})
                watchdog.beat()
                if stop and done < total:
                    saved = f"saved after step {done}" if checkpoints.wait() else "but could not save"
                    say(f"{run}: asked to stop, {saved}; the same command goes on from there")
                    metrics.close()
                    dist.barrier()  # or rank 0 would be ended with the others while it cleans up
                    return False
            checkpoints.wait()
        metrics.close()
    return True


@contextmanager
def _sole_user(run: Path) -> Iterator[None]:
    """Two trainings in one folder would spoil each other: rank 0 holds a lock that dies with it."""
    if dist.rank() != 0:
        yield
        return
    with lock(run / ".lock") as mine:
        if not mine:
            raise UserError(f"{run}: another process is training in this folder")
        yield


def _build(config: TrainConfig, device: torch.device, state: dict[str, Any] | None) -> tuple[ShardData, Objective]:
    """The data and the objective. Rank 0 writes missing indices, and starts the list of broken samples of a new run."""
    path = config.run.dir / "rejected.jsonl"
    rejected = RejectLog(path)
    if dist.rank() == 0 and (state is None or path.is_symlink()):
        rejected.clear()
    accept = identity.check_data(config.run.dir, config, state)
    data, objective = build(config, device, rejected, state is None, accept)
    if dist.rank() == 0:
        for line in data.unfilled():
            say(line)
    return data, objective


def _write_config(run: Path, config: TrainConfig) -> None:
    if dist.rank() == 0:
        with publish(run / "config.yaml") as temporary:
            temporary.write_text(configuration.dump(config), encoding="utf-8")


def validation_loss(objective: Objective, network: nn.Module, data: ShardData) -> float:
    """Mean of `validation_losses`; NaN if no samples are held out."""
    return float(validation_losses(objective, network, data, 64).mean())


def validation_losses(objective: Objective, network: nn.Module, data: ShardData, batch_size: int) -> torch.Tensor:
    """The loss of each held-out sample [N], float64, on noise that depends on a sample's place in the set alone."""
    losses: list[torch.Tensor] = []
    draws = NoisePlan(0)
    with torch.inference_mode():
        for batch in data.validation(batch_size):
            batch = batch.to(dist.device())
            losses.append(objective.validate(network, batch, draws.at(0, batch.positions)).double().cpu())
    return torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64)


def _publish(
    run: Path, done: int, objective: Objective, data: ShardData, network: nn.Module, weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Rank 0: write the snapshot, look at it (validation loss, picture), and return its line of metrics."""
    network.load_state_dict(weights)
    network.eval()
    value = validation_loss(objective, network, data)
    with torch.inference_mode():
        picture = objective.preview(network)
    try:
        snapshot.write(run, done, weights, objective.metadata())
        with publish(run / "samples" / f"{done:08d}.png") as temporary:
            picture.save(temporary, format="png")
    except (OSError, SafetensorError) as error:
        say(f"snapshot {done} failed ({error}); training goes on")
    return {"step": done, "val_loss": value}
