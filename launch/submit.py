"""`mmdit submit`, and the only place that imports submitit: a command as a job, on Slurm or on this machine.

A job's pickle holds the arguments of an `mmdit` command and no more. In each task the command runs as a child process,
not in submitit's own: that one stays free of threads, CUDA and collectives, so its signal handlers always answer; the
child starts with the system's handlers, which its workers then inherit instead of submitit's; and the command ends as
it does by hand, with an exit code and its last lines.

Asked to stop (SIGUSR1, SIGUSR2 or SIGTERM: a time limit is near, or somebody wants the nodes), each task passes the
signal on. A training saves and ends with exit code 85. Task 0 then goes through submitit's requeue and the others end,
unless the job was cancelled.

    from launch.submit import Resources, prepare, submit

    train = prepare("train", "configs/train/x.yaml", "optim.lr=1e-4")
    (job,) = submit([train], Resources(nodes=2, tasks_per_node=8, gpus_per_node=8), train.folder / "jobs")
    job.results()  # waits; raises with the command's last lines if it failed
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from launch.environment import MALLOC, STOPPED, die_with_parent
from stack.config import Config, UserError, load, validate
from stack.shown import redact
from stack.train.preempt import SIGNALS

# What shows that a command gets on: files in its folder that appear or change only when work is done.
PROGRESS = {"train": "checkpoints/*/COMPLETE", "preencode": "*.tar", "evaluate": "eval.jsonl"}
MAX_STALLS = 3  # requeues in a row without progress after which a job fails
LIVES = 1_000_000  # submitit counts every signal of a short job as a time-out; on Slurm MAX_STALLS alone ends a job
LOCAL_MINUTES = 7 * 24 * 60  # submitit wants a time limit on this machine, too
MAX_RETRIES = 3  # of a command that ends with exit code 1, each task for itself: ranks meet again at their address
RETRY_S = 10.0
LAST_LINES = 20  # of the command's log, in the exception of a failed job


class Resources(Config):
    """What a job gets."""

    cluster: Literal["auto", "slurm", "local"] = "auto"
    """auto: Slurm where its commands are installed, else this machine."""
    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    """Ranks; one a GPU, where there are GPUs."""
    gpus_per_node: NonNegativeInt = 0
    """With 0 a job sees none."""
    cpus_per_task: PositiveInt | None = None
    mem_gb: PositiveInt | None = None
    """Memory a node."""
    timeout_min: PositiveInt | None = None
    """Time limit, at which a training is requeued and goes on. If not given, an hour on Slurm and a week here."""
    signal_delay_s: PositiveFloat = 120
    """Seconds before the time limit at which the job is asked to stop and save."""
    parallel: PositiveInt | None = None
    """Jobs of a sweep that run at once: one on this machine and as many as Slurm admits if not given."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: dict[str, str | int | bool] = Field(default={})
    """Other options of sbatch: {constraint: a100, reservation: x}."""

    @model_validator(mode="after")
    def _check(self) -> Resources:
        texts = [self.partition, self.account, self.qos, *self.sbatch, *self.sbatch.values()]
        for text in texts:  # each is a line of the batch script, and what follows a line break would run there
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{text!r}: a line break or another control character in an option of sbatch")
        for name in self.sbatch:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"sbatch: {name!r} is not the name of an option")
        if self.timeout_min is not None and self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"timeout_min={self.timeout_min} leaves no time before the signal, which comes "
                f"signal_delay_s={self.signal_delay_s:g} seconds ahead of it"
            )
        if self.cluster == "local" and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}, but cluster=local has one node")
        return self

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def resolved(self) -> Resources:
        """With the cluster that `auto` means. Raises UserError where Slurm is asked for and not installed."""
        installed = shutil.which("sbatch") is not None
        if self.cluster == "slurm" and not installed:
            raise UserError("cluster=slurm, but there is no sbatch here: log in to the cluster, or take cluster=local")
        cluster = ("slurm" if installed else "local") if self.cluster == "auto" else self.cluster
        return validate(Resources, {**self.model_dump(), "cluster": cluster}, "resources")


class CommandError(RuntimeError):
    """A command that failed: its exit code and last lines."""


@dataclass
class Command:
    """The callable of a job: `mmdit ARGUMENTS` in each task, checkpointable in submitit's sense."""

    arguments: tuple[str, ...]
    folder: Path
    """Where the command writes: its progress is seen there, and the job's files lie in its subfolder `jobs`."""
    grace_s: float = 60
    """Time to save in after a signal; then the command is killed."""
    stalls: int = 0
    """Requeues in a row without progress."""
    _before: int | None = field(default=0, init=False)
    """Its progress when this life began."""

    def __call__(self) -> None:
        from submitit import JobEnvironment

        job = JobEnvironment()
        result = job.paths.result_pickle  # of an earlier life of this job, whole or half written
        for path in (result, result.with_name(f"{result.name}.save_tmp")):
            path.unlink(missing_ok=True)
        self._before = self._progress()
        log, main = job.paths.stderr, job.global_rank == 0
        start = log.stat().st_size if log.exists() else 0
        variables = _variables(job)
        for left in reversed(range(MAX_RETRIES + 1)):
            code, signals = _run(self.arguments, variables, self.grace_s)
            if code == 0:
                return
            if code != 1 or signals or not left:  # 1: it may pass, as an error of the network or a shared folder does
                break
            print(f"mmdit: exit code 1: again ({MAX_RETRIES - left + 1} of {MAX_RETRIES})", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)
        if code == 2 or not (code == STOPPED or signals):
            if job.cluster == "local" and job.num_tasks > 1 and os.getppid() == int(job.job_id):
                os.kill(os.getppid(), signal.SIGTERM)  # submitit would leave the other tasks in their collective
            raise CommandError(_failure(code, log, start))
        if code == STOPPED and self.arguments[0] == "evaluate":
            self._before = None  # it waits for snapshots, and that is no stall
        if main and not _cancelled(job, signals):
            signal.raise_signal(job._usr_sig())  # submitit's handler, back in its place: checkpoint() and requeue
        sys.exit(0)  # without a result: this life of the job is over, the job is not

    def checkpoint(self) -> Any:
        """What submitit pickles for the job's next life; it calls this on task 0, in its signal handler.

        Raises CommandError after MAX_STALLS lives that achieved nothing.
        """
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        stalls = self.stalls + 1 if self._before == self._progress() else 0
        if stalls > MAX_STALLS:
            raise CommandError(
                f"asked to stop {stalls} times in a row before anything was saved: give it a longer time limit"
            )
        pickle = JobEnvironment().paths.submitted_pickle
        pickle.with_name(f"{pickle.name}.save_tmp").unlink(missing_ok=True)  # of a kill while this was written
        return DelayedSubmission(replace(self, stalls=stalls))

    __submitit_checkpoint__ = checkpoint

    def _progress(self) -> int:
        return max((path.stat().st_mtime_ns for path in self.folder.glob(PROGRESS[self.arguments[0]])), default=0)


def _run(arguments: Sequence[str], variables: dict[str, str], grace_s: float) -> tuple[int, set[int]]:
    """Run the command to its end. Its exit code, and the signals that came meanwhile, which were passed on to it."""
    came: dict[int, float] = {}

    def note(number: int, frame: object) -> None:
        came.setdefault(number, time.monotonic())

    before = {s: signal.signal(s, note) for s in SIGNALS}
    environment = {**MALLOC, **os.environ, **variables}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    passed_on: set[int] = set()
    try:
        while process.poll() is None:
            for number in came.keys() - passed_on:
                process.send_signal(number)
                passed_on.add(number)
            if came and time.monotonic() > min(came.values()) + grace_s:
                process.kill()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        for s, handler in before.items():
            signal.signal(s, handler)
    return process.returncode, set(came)


def _cancelled(job: Any, signals: set[int]) -> bool:
    """Whether a job that was signalled is not to come back; else it is preempted or near its time limit."""
    if job.cluster == "local":
        return signals == {signal.SIGTERM}
    command = ["scontrol", "show", "job", job.job_id, "--oneliner"]
    return (
        " JobState=RUNNING "
        not in subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    )


def _variables(job: Any) -> dict[str, str]:
    """What the command finds in its environment: its place among the tasks, which on Slurm it asks Slurm for itself.

    A single task has none, so that it may start ranks of its own (--ranks).
    """
    from stack.dist import VARIABLES

    for name in VARIABLES:
        os.environ.pop(name, None)  # of the process that submitted
    slurm = job.cluster == "slurm"
    threads = os.environ.get("SLURM_CPUS_PER_TASK", 1) if slurm else max(1, (os.cpu_count() or 1) // job.num_tasks)
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if not slurm and job.num_tasks > 1:
        port = 10_000 + int(job.job_id) % 20_000  # below the ephemeral range
        place = (job.global_rank, job.num_tasks, job.local_rank, "127.0.0.1", port)
        found |= zip(VARIABLES, map(str, place), strict=True)
    return found


def _failure(code: int, log: Path, start: int) -> str:
    """How the command ended, and the last lines that it wrote to its log."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return redact("\n".join([how, *lines]))


def prepare(name: str, *arguments: str) -> Command:
    """`mmdit NAME ARGUMENTS`, checked as far as that goes without running it.

    Raises UserError (or click's errors, for options) for what the command itself would refuse at once.
    """
    if name not in PROGRESS:
        raise UserError(f"cannot submit {name!r}: expected {', '.join(PROGRESS)}")
    for argument in arguments:
        if redact(argument) != argument:
            raise UserError(
                f"{redact(argument)}: what a job is given is written to a file; credentials belong in the environment"
            )
    command: click.Command = importlib.import_module(f"launch.{name}").command
    given = command.make_context(name, list(arguments)).params
    if name == "evaluate":
        return Command((name, *arguments), given["run"])
    if name == "train":
        from stack.train.recipe import TrainConfig

        return Command((name, *arguments), load(TrainConfig, given["config"], given["overrides"]).run.dir)
    from stack.preencode.job import PreencodeConfig

    return Command((name, *arguments), load(PreencodeConfig, given["config"], given["overrides"]).out)


def submit(commands: Sequence[Command], resources: Resources, folder: Path, slot: int = 0) -> list[Any]:
    """Start a job for each command, as one array on Slurm; submitit's jobs, in the same order.

    folder: of the jobs' files.  slot: on this machine, which of its GPUs.
    Raises UserError where the cluster does not take them.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    resources = resources.resolved()
    delay = resources.signal_delay_s
    ready = [replace(command, grace_s=max(delay - 30, delay / 2)) for command in commands]  # time for the requeue
    executor = _executor(folder, resources, commands[0].arguments[0], slot)
    try:
        with redirect_stderr(io.StringIO()):  # sbatch's answer, which is raised as well
            jobs: list[Any] = executor.submit_array(ready)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(redact(" ".join(str(error).split()))) from None
    return jobs


def submitted(job: Any) -> Submitted:
    """What is kept of one of submitit's jobs."""
    return Submitted(cluster="slurm" if "Slurm" in type(job).__name__ else "local", id=job.job_id, tasks=job.num_tasks)


def _executor(folder: Path, resources: Resources, name: str, slot: int) -> Any:
    import submitit

    r = resources
    if r.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=LIVES)
        gpus = tuple(range(slot * r.gpus_per_node, (slot + 1) * r.gpus_per_node))
        local.update_parameters(
            tasks_per_node=r.tasks_per_node,
            gpus_per_node=r.gpus_per_node,
            visible_gpus=gpus,
            timeout_min=r.timeout_min or LOCAL_MINUTES,
            signal_delay_s=r.signal_delay_s,
        )
        return local
    if found := re.search(r"[%\\\0-\x1f\x7f]", str(folder.absolute())):
        raise UserError(f"{str(folder)!r}: sbatch cannot write logs into a folder with {found[0]!r} in its path")
    slurm = submitit.SlurmExecutor(folder, max_num_timeout=LIVES)
    cpus = [f"--cpus-per-task={r.cpus_per_task}"] if r.cpus_per_task else []  # srun no longer takes sbatch's
    wanted = {
        "job_name": f"mmdit-{name}",
        "time": r.timeout_min or 60,
        "nodes": r.nodes,
        "ntasks_per_node": r.tasks_per_node,
        "gpus_per_node": r.gpus_per_node or None,
        "cpus_per_task": r.cpus_per_task,
        "mem": f"{r.mem_gb}GB" if r.mem_gb else None,
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "signal_delay_s": int(r.signal_delay_s),
        "array_parallelism": r.parallel,
        "srun_args": ["--kill-on-bad-exit=1", *cpus],
        "additional_parameters": {"requeue": True, **r.sbatch},
    }
    slurm.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return slurm


class Submitted(Config):
    """What is kept of a job, to find it again."""

    cluster: Literal["slurm", "local"]
    id: str
    tasks: PositiveInt


class State(NamedTuple):
    """Where a job stands."""

    name: Literal["queued", "running", "finished", "failed", "stopped"]
    """stopped: it is gone and has left no result: cancelled, killed, or out of lives."""
    reason: str = ""
    """Of a failed one, what its command wrote last."""

    @property
    def alive(self) -> bool:
        return self.name in ("queued", "running")


def states(folder: Path, jobs: Sequence[Submitted]) -> list[State]:
    """The state of each job, whoever started it. Raises UserError where Slurm does not answer.

    folder: of the jobs' files.
    """
    slurm = _slurm([job.id for job in jobs if job.cluster == "slurm"])
    gone = State("stopped", "ended without a result, and Slurm no longer knows it")
    killed = State("stopped", "cancelled or killed")

    def standing(job: Submitted) -> State:
        if job.cluster == "slurm":
            return slurm.get(job.id, gone)
        return State("running") if _controller(folder, job.id) else killed

    found = [standing(job) for job in jobs]
    # After that, since what has ended left its result before; a listing sees what others wrote to a shared folder.
    names = set(os.listdir(folder)) if folder.exists() else set()
    return [s if s.alive else _outcome(folder, names, job) or s for s, job in zip(found, jobs, strict=True)]


def _controller(folder: Path, job: str) -> Any:
    """submitit's process that leads a local job, whose id is the job's; None if it is gone."""
    import psutil

    try:
        process = psutil.Process(int(job))
        words = process.cmdline()
    except psutil.Error:
        return None
    return process if words[-2:] == ["submitit.local._local", str(folder.absolute())] else None


def _slurm(jobs: Sequence[str]) -> dict[str, State]:
    """What Slurm knows of jobs; it forgets those that ended some minutes ago."""
    if not jobs:
        return {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={numbers}"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {' '.join(done.stderr.split())}")
    found = {}
    for job, state, reason in (line.split("|") for line in done.stdout.splitlines()):
        if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"):
            found[job] = State("running")
        elif state in ("PENDING", "CONFIGURING", "SPECIAL_EXIT") or state.startswith("REQUEUE"):
            found[job] = State("queued", reason)
        else:
            found[job] = State("stopped", f"Slurm: {state.lower()}")
    return found


def _outcome(folder: Path, names: set[str], job: Submitted) -> State | None:
    """What the tasks of a job that is gone have left: the first failure is the one that counts."""
    from submitit.core.utils import JobPaths, pickle_load

    results = [JobPaths(folder, job.id, task).result_pickle for task in range(job.tasks)]
    ordered = sorted((path for path in results if path.name in names), key=lambda path: path.stat().st_mtime_ns)
    outcomes = [pickle_load(path) for path in ordered]
    for outcome, trace in outcomes:
        if outcome == "error":
            return State("failed", trace.rpartition(f"{CommandError.__name__}: ")[2].strip())
    return State("finished") if len(outcomes) == job.tasks else None


def cancel(folder: Path, jobs: Sequence[Submitted]) -> None:
    """Ask jobs to end, and not to come back. A training still saves."""
    if slurm := [job.id for job in jobs if job.cluster == "slurm"]:
        subprocess.run(["scancel", *slurm], check=True)
    for job in jobs:
        if job.cluster == "local" and (controller := _controller(folder, job.id)):
            controller.terminate()


def _pairs(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, _, value in (pair.partition("=") for pair in given)}


@click.command("submit", context_settings={"ignore_unknown_options": True})
@click.argument("name", metavar="COMMAND", type=click.Choice(list(PROGRESS)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
@click.option("--cluster", type=click.Choice(["auto", "slurm", "local"]), default="auto", show_default=True)
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option("--tasks-per-node", type=int, default=1, show_default=True, help="Ranks: one a GPU.")
@click.option("--gpus-per-node", type=int, default=0, show_default=True, help="With 0 it sees none.")
@click.option("--cpus-per-task", type=int)
@click.option("--mem-gb", type=int, help="Memory a node.")
@click.option("--timeout-min", type=int, help="Time limit; at it, a training is requeued. 60 on Slurm, a week here.")
@click.option("--signal-delay-s", type=float, default=120, show_default=True, help="So long before, it begins to save.")
@click.option("--partition")
@click.option("--account")
@click.option("--qos")
@click.option("--sbatch", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Other options of sbatch.")
@click.option("--wait", is_flag=True, help="Until the job has ended; exit code 1 if it failed.")
def command(name: str, arguments: tuple[str, ...], wait: bool, **resources: Any) -> None:
    """Run `mmdit COMMAND ARGUMENTS` as a job, on Slurm or on this machine: train, preencode or evaluate.

    A training that is preempted or reaches its time limit saves, is requeued and goes on. The job's files are in the
    folder `jobs` of the command's own.
    """
    asked = validate(Resources, resources, "mmdit submit").resolved()
    prepared = prepare(name, *arguments)
    folder = prepared.folder / "jobs"
    (job,) = submit([prepared], asked, folder)
    click.echo(f"job {job.job_id} ({asked.cluster}): {job.paths.stderr if asked.tasks == 1 else folder}")
    while wait:
        (state,) = states(folder, [submitted(job)])
        if not state.alive:
            click.echo(f"job {job.job_id} {state.name}{f': {state.reason}' if state.reason else ''}", err=True)
            raise click.exceptions.Exit(0 if state.name == "finished" else 1)
        time.sleep(1)
