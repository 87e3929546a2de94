"""The training loop: fetch, accumulate, step, log, snapshot, checkpoint, preempt. There is one, and it is all here."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential
from torch import nn

from stack import config as configuration
from stack import dist
from stack.config import UserError, is_users
from stack.data.dataset import ShardData
from stack.data.identity import DataIdentity
from stack.data.plan import check_division
from stack.data.safety import RejectLog
from stack.files import is_remainder, lock, publish, remove_leftovers
from stack.flow.noise import NoisePlan
from stack.log import Metrics, progress, say
from stack.models.compute import configure
from stack.parallel import engine as engines
from stack.parallel.ema import Ema
from stack.train import identity, origin, snapshot
from stack.train.checkpoint import Checkpoints, Record
from stack.train.guard import Guard
from stack.train.metrics import Sums
from stack.train.objective import Objective
from stack.train.preempt import Preemption
from stack.train.recipe import TrainConfig, build, check
from stack.train.schedule import learning_rate, steps_of
from stack.train.watchdog import Watchdog

LOCK_WAIT_S = 120.0
"""Time that an earlier life of a run has to end: more than a file server needs to drop the locks of a dead node."""
TRIES = 9
"""How often the last checkpoint and snapshot of a life are tried, over two minutes, before the run fails."""
PARTS = frozenset({"snapshot", "val_loss", "picture"})
"""What there is of each snapshot's step."""


class _Record(Record):
    """What the loop needs of a checkpoint."""

    sums: list[dict[str, float]]
    skipped: int
    in_a_row: int
    wandb: str | None


def train(config: TrainConfig) -> bool:
    """Run or go on with the training that `config` describes. False if it was asked to stop before its last step.

    Needs the process group (`stack.dist.init`). Raises UserError for what the user can mend, NonFiniteError.
    """
    run = config.run.dir.resolve()  # a symbolic link on the way may be pointed at another run meanwhile
    seed, size = config.run.seed, config.data.batch_size
    accumulate, device = config.parallel.accumulate, dist.device()
    check(config, device)
    total = steps_of(config.schedule.steps, size)
    save_every, snapshot_every = steps_of(config.checkpoint.every, size), steps_of(config.snapshot.every, size)
    keep_every = steps_of(config.checkpoint.keep_every, size) if config.checkpoint.keep_every else 0
    with _sole_user(run):
        checkpoints = Checkpoints(run, config.checkpoint, keep_every)
        state = checkpoints.newest(_Record)
        identity.check_settings(run, config, state)
        data, objective = _build(config, run, device, state)
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
        _try_preview(objective, averaged)
        if state is not None:
            checkpoints.load(state, engine, ema)
            say(f"{run}: going on after step {state['step']}")
        start = state["step"] if state else 0
        if dist.rank() == 0:
            inputs = {"data": data.identity.fingerprint, "encoders": encoders, "init": init}
            _write_records(run, config, start, data.identity, inputs)
        guard = Guard(config.run.max_nonfinite, *((state["skipped"], state["in_a_row"]) if state else (0, 0)))
        sums = Sums(state["sums"] if state else None)
        metrics = Metrics(run, config.log, start, state["wandb"] if state else None, configuration.public(config))
        batches = iter(data.loader(start, total, dist.rank(), dist.world_size(), accumulate))

        def is_milestone(step: int) -> bool:
            return step > 0 and (step % snapshot_every == 0 or step == total)

        listening, watching = Preemption(), Watchdog(config.run.watchdog_s)
        with listening as preemption, watching as watchdog, progress(run.name, total, "step", start) as advance:
            stop, problem = False, ""
            if is_milestone(start) and (missing := dist.broadcast(_missing(run, start, metrics))):
                weights = ema.gathered()
                if "snapshot" in missing:
                    write = partial(_write_snapshot, run, start, objective, weights)
                    failed = _repeat(write, watchdog.beat) if start == total else write()
                    problem = failed if start == total else ""
                _look(run, start, objective, data, averaged, weights, metrics, missing)
                dist.barrier()

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
                    line |= {"epoch": data.plan.epoch_of(step), "skipped": guard.skipped}
                    line |= {} if checkpoints.newest_step is None else {"checkpoint": checkpoints.newest_step}
                    metrics.write(line)
                    advance(0, f"loss {line['loss']:.4f}")
                stop = preemption.agreed()
                last = stop or done == total
                if is_milestone(done):
                    weights = ema.gathered()
                    write = partial(_write_snapshot, run, done, objective, weights)
                    failed = _repeat(write, watchdog.beat) if last else write()
                    problem = failed if last else ""
                    if dist.rank() == 0 and not failed:
                        snapshot.retire(run, done, config.snapshot, size)
                if done % save_every == 0 or last:
                    with sums.timed("checkpoint_stall_s"):
                        metrics.sync()
                        kept: dict[str, Any] = {"samples": done * size, "sums": dist.all_gather(sums.state())}
                        kept |= {"skipped": guard.skipped, "in_a_row": guard.in_a_row, "wandb": metrics.run_id}
                        kept |= {"engine": config.parallel.engine, "zero_stage": config.parallel.zero_stage}
                        kept |= {"encoders": encoders, "data": data.identity.fingerprint, "init": init}
                        kept |= {"config": configuration.fingerprint(config)}
                        if last:
                            save = partial(checkpoints.save_now, done, engine, ema, kept)
                            problem = _repeat(save, watchdog.beat) or problem
                        else:
                            checkpoints.save(done, engine, ema, kept)
                if is_milestone(done) and (done == total or not stop):
                    _look(run, done, objective, data, averaged, weights, metrics, PARTS)
                    dist.barrier()
                watchdog.beat()
                if stop:
                    break
            problem = _repeat(partial(_sync, metrics), watchdog.beat) or problem
        metrics.close()
        if problem:
            raise OSError(f"{run}: {problem}; the same command goes on from the last checkpoint")
        if stop and done < total:
            say(f"{run}: asked to stop, saved after step {done}; the same command goes on from there")
            dist.barrier()  # or rank 0 would be ended with the others while it cleans up
            return False
    return True


@contextmanager
def _sole_user(run: Path) -> Iterator[None]:
    """Hold the folder's lock on rank 0: two trainings in one folder would overwrite each other's files.

    Waits up to LOCK_WAIT_S for what is left of an earlier life of this run. Raises UserError for another training,
    TimeoutError for an earlier life that does not end.
    """
    if dist.rank() != 0:
        yield
        return
    path, began, said = run / ".lock", time.monotonic(), False
    while True:
        with lock(path) as mine:
            if mine:
                yield
                return
        if not is_remainder(path):
            raise UserError(f"{run}: another process is training in this folder")
        if time.monotonic() - began > LOCK_WAIT_S:
            raise TimeoutError(f"{run}: an earlier life of this run still holds {path} after {LOCK_WAIT_S:g} seconds")
        if not said:
            say(f"{run}: waiting until an earlier life of this run has ended")
            said = True
        time.sleep(0.5)


def _build(
    config: TrainConfig, run: Path, device: torch.device, state: dict[str, Any] | None
) -> tuple[ShardData, Objective]:
    """The data and the objective. Rank 0 writes missing indices, and starts the list of broken samples of a new run."""
    path = run / "rejected.jsonl"
    rejected = RejectLog(path)
    if dist.rank() == 0 and (state is None or path.is_symlink()):
        rejected.clear()
    accept = identity.check_data(run, config, state)
    data, objective = build(config, device, rejected, state is None, accept, previews=dist.rank() == 0)
    if dist.rank() == 0:
        for line in data.unfilled():
            say(line)
        if not data.num_held_out:
            say("no sample is held out: val_loss is null; to have one, raise data.validation_share or max_validation")
    return data, objective


def _repeat(attempt: Callable[[], str], beat: Callable[[], None]) -> str:
    """Call `attempt` until it returns no problem, TRIES times, after pauses of 1, 2, 4, … 30 s. The last problem.

    The pauses are the same on all ranks. `beat` is called in them.
    """

    def pause(seconds: float) -> None:
        say(f"trying again in {seconds:g} s")
        for _ in range(round(seconds)):
            beat()
            time.sleep(1)

    retrying = Retrying(
        retry=retry_if_result(bool),
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(max=30),
        sleep=pause,
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else "",
    )
    problem: str = retrying(attempt)
    return problem


def _try_preview(objective: Objective, network: nn.Module | None) -> None:
    """Draw one image of the preview before the first step, with the untrained network and all settings.

    UserError on all ranks for a mistake of the user's. What else fails is reported. No random state changes.
    """
    problem = ""
    if network is not None:
        device = dist.device()
        network.to(device).eval()
        try:
            with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                objective.preview(network, 1)
        except UserError as error:
            problem = str(error)
        except Exception as error:
            say(f"the preview failed before the first step ({_reason(error)}); training goes on")
    if problem := dist.broadcast(problem):
        raise UserError(problem)


def _write_records(run: Path, config: TrainConfig, start: int, data: DataIdentity, inputs: dict[str, Any]) -> None:
    """Make `run` the folder of this training: config.yaml, origin.json, data.json. For rank 0."""

    known, text = identity.origin_of(config, inputs), configuration.dump(config)

    def write() -> str:
        try:
            with origin.beginning(run, start, known), publish(run / "config.yaml") as temporary:
                temporary.write_text(text, encoding="utf-8")
            identity.write(run, data)
        except OSError as error:
            if is_users(error):
                raise
            path = run / "config.yaml"
            if origin.of(run) == known and path.is_file() and path.read_bytes() == text.encode():
                return ""  # an earlier life has written them
            say(f"{run}: origin.json, data.json or config.yaml cannot be written: {error}")
            return str(error)
        return ""

    remove_leftovers(run, {"config.yaml", "metrics.jsonl", "keys.jsonl", "wandb.json", "origin.json", "data.json"})
    remove_leftovers(run / "samples")
    if problem := _repeat(write, lambda: None):
        raise OSError(problem)


def _sync(metrics: Metrics) -> str:
    """Bring the metrics to the disk. A collective: the problem, the same on all ranks."""
    stored = dist.broadcast(metrics.sync())
    return "" if stored else f"{metrics.path.name}: not all lines could be written"


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


def _write_snapshot(run: Path, step: int, objective: Objective, weights: dict[str, torch.Tensor] | None) -> str:
    """Publish the snapshot, of rank 0's `weights`. A collective: the problem, the same on all ranks."""
    problem = ""
    if weights is not None:
        try:
            snapshot.write(run, step, weights, objective.metadata())
        except (OSError, SafetensorError) as error:
            problem = f"snapshot {step} failed ({error})"
            say(f"{problem}; training goes on")
    problem = dist.broadcast(problem)
    return problem


def _missing(run: Path, step: int, metrics: Metrics) -> set[str]:
    """On rank 0, those PARTS that a life that ended after the checkpoint of `step` has not written."""
    if dist.rank() != 0:
        return set()
    there = {
        "snapshot": step in snapshot.steps(run),
        "val_loss": metrics.last.get("step") == step and "val_loss" in metrics.last,
        "picture": (run / "samples" / f"{step:08d}.png").exists(),
    }
    return {part for part in PARTS if not there[part]}


def _look(
    run: Path,
    step: int,
    objective: Objective,
    data: ShardData,
    network: nn.Module | None,
    weights: dict[str, torch.Tensor] | None,
    metrics: Metrics,
    parts: Collection[str],
) -> None:
    """On rank 0, where `network` is: the validation loss and the picture of averaged weights.

    What fails is reported, whatever it is: the snapshot and the checkpoint of the step are there already.
    """
    if network is None or weights is None:
        return
    network.to(dist.device()).load_state_dict(weights)
    network.eval()
    if "val_loss" in parts:
        value = math.nan
        try:
            value = validation_loss(objective, network, data)
            if data.num_held_out and not math.isfinite(value):
                say(f"step {step}: the validation loss is {value}: val_loss is null")
        except Exception as error:
            say(f"step {step}: the validation failed ({_reason(error)}): val_loss is null; training goes on")
        metrics.write({"step": step, "val_loss": value})
    if "picture" in parts:
        try:
            with torch.inference_mode():
                picture = objective.preview(network)
            with publish(run / "samples" / f"{step:08d}.png") as temporary:
                picture.save(temporary, format="png")
        except Exception as error:
            say(f"step {step}: the picture failed ({_reason(error)}); training goes on")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
