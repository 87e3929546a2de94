"""Evaluation as a service: every snapshot of a run, as they appear on the shared folder, by any number of evaluators.

An evaluator leases a snapshot (`stack.claims`), so that nobody else takes it and retention spares it, and publishes the
result. If it dies, the lease goes to another. What was measured with the same settings is not measured again.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from stack.config import UserError
from stack.evaluate.run import EvaluationConfig, Evaluator, numbers
from stack.log import say
from stack.train import snapshot
from stack.train.preempt import Preemption

POLL_S = 2.0
MAX_TRIES = 3
"""Of a snapshot, by one evaluator."""


class Stopped(BaseException):
    """The evaluator was asked to stop."""


class _Stop(Preemption):
    """Signals end what is marked as interruptible at once; leases are taken and released, and results published,
    undisturbed."""

    _interrupts = False

    def _set(self, number: int, frame: FrameType | None) -> None:
        super()._set(number, frame)
        if self._interrupts:
            self._interrupts = False
            raise Stopped

    def check(self) -> None:
        if self._flag:
            raise Stopped

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False


def watch(run: Path, asked: EvaluationConfig, overrides: Sequence[str] = (), patience_s: float = math.inf) -> list[int]:
    """Evaluate the snapshots of `run` until it has come to its last step and none is left.

    Waits for the run's folder, for snapshots, and for those that others evaluate. Returns the steps of snapshots that
    failed MAX_TRIES times. SIGUSR1, SIGUSR2 or SIGTERM end it by `Stopped`: the lease in hand is released, and what was
    measured of that snapshot is lost. Raises UserError as `Evaluator` does, and where the run has shown no sign of life
    for `patience_s`.
    """
    began = time.time()
    with _Stop() as stop:
        if not (run / "config.yaml").exists():
            say(f"{run}: waiting for a training to begin here")
        while not (run / "config.yaml").exists():
            stop.check()
            _lose_patience(run, began, patience_s)
            time.sleep(POLL_S)
        while True:
            with stop.interrupting():
                evaluator = Evaluator(run, asked, overrides)
            say(f"{run}: watching for snapshots")
            with closing(evaluator):
                failed = _watch(evaluator, stop, began, patience_s)
            if failed is not None:
                return failed
            say(f"{run}: another training has begun here")


def _watch(evaluator: Evaluator, stop: _Stop, began: float, patience_s: float) -> list[int] | None:
    """As `watch`, of one training; None where another one has begun in the folder."""
    run, failures = evaluator.run, Counter[int]()
    evaluator.results.gather()  # also the results of evaluators that died before they had added their lines
    while True:
        stop.check()
        finished = evaluator.finished()  # asked first: then the last snapshot is among those seen next
        if evaluator.outdated():
            return None
        steps = [step for step in snapshot.steps(run) if not _measured(evaluator, step)]
        left = [step for step in steps if failures[step] < MAX_TRIES]
        if finished and not left:
            evaluator.results.gather()
            return steps
        evaluated = False
        for step in left:
            stop.check()
            if evaluator.outdated():
                return None
            evaluated |= _evaluate(evaluator, step, failures, stop)
        if not evaluated:
            if not left:
                _lose_patience(run, began, patience_s)
            time.sleep(POLL_S)


def _measured(evaluator: Evaluator, step: int) -> bool:
    """Whether snapshot `step` has a result; not where that cannot be read, which `_evaluate` reports."""
    try:
        return evaluator.measured(step)
    except (OSError, UserError):
        return False


def _lose_patience(run: Path, began: float, patience_s: float) -> None:
    """UserError where nothing was written by the training for too long; before it begins, since `began`."""
    signs = [path.stat().st_mtime for path in (run / "metrics.jsonl", run / "config.yaml") if path.exists()]
    if time.time() - max(signs, default=began) > patience_s:
        raise UserError(
            f"{run}: no sign of its training for {patience_s / 3600:g} hours: start both again, or give --patience"
        )


def _evaluate(evaluator: Evaluator, step: int, failures: Counter[int], stop: _Stop) -> bool:
    """Whether snapshot `step` was evaluated; not if another evaluator has it in hand or was first."""
    try:
        with evaluator.leases.hold(evaluator.lease(step)) as mine:
            if not mine or evaluator.measured(step) or not evaluator.snapshot(step).exists():
                return False
            with stop.interrupting():
                result = evaluator.measure(step)
            evaluator.report(result)
    except Exception as error:
        failures[step] += 1
        reason = " ".join(str(error).split())
        say(f"{evaluator.run}: snapshot {step} failed, try {failures[step]} of {MAX_TRIES}: {reason}")
        return False
    say(f"{evaluator.run}: {json.dumps(numbers(result))}")
    return True
