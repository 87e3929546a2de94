"""Who am I: a process that is alone, one of several that `--ranks N` started here, or a task of a Slurm step."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import BinaryIO

import click

from stack.config import UserError
from stack.train.preempt import EXIT_CODE as STOPPED
from stack.train.preempt import SIGNALS

# glibc gives freed memory back to the kernel at once and a training step then spends its time on page faults:
# keep what was used. Read by malloc at start-up, so they are set for processes that are started from here.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

PR_SET_PDEATHSIG = 1  # of prctl(2)


def set_defaults() -> None:
    """Quiet defaults of the libraries that are asked for nothing here."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # says at import that it was built for another torch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if "SLURM_LOCALID" in os.environ:  # which GPU is this task's, in commands that form no group as well
        os.environ.setdefault("LOCAL_RANK", _slurm_local_rank())


def record_exit(code: int) -> None:
    """Tell slurm/job.sh what this rank ends with, unless another one has: srun reports the highest code of all ranks,
    which is that of the ones it ended itself because the first had failed."""
    if code and "MMDIT_FIRST_EXIT" in os.environ:
        with suppress(OSError), open(os.environ["MMDIT_FIRST_EXIT"], "x", encoding="utf-8") as file:
            file.write(f"{code} {os.environ.get('SLURM_PROCID', 0)}\n")


def is_rank() -> bool:
    """Whether a launcher has said which rank this process is: with torch's variables, or Slurm as one task of several,
    for which torch's variables are then set.

    Raises UserError where Slurm's commands do not say on which address rank 0 is found.
    """
    if not os.environ.get("RANK") and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(slurm_rank())
    return bool(os.environ.get("RANK"))


def slurm_rank() -> dict[str, str]:
    """The five variables of this task of a Slurm step."""
    from stack.dist import VARIABLES

    slurm = os.environ
    # Below the ephemeral range, and another one for each step: of a step that was killed, a process may still listen.
    port = 10_000 + (int(slurm["SLURM_JOB_ID"]) + 7919 * int(slurm["SLURM_STEP_ID"])) % 20_000
    node = _scontrol("show", "hostnames", slurm["SLURM_STEP_NODELIST"]).split()[0]
    values = slurm["SLURM_PROCID"], slurm["SLURM_STEP_NUM_TASKS"], _slurm_local_rank(), _address(node), str(port)
    return dict(zip(VARIABLES, values, strict=True))


def _slurm_local_rank() -> str:
    """The number of this task on its node, among the GPUs that it sees: Slurm may show each task its own alone."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    local = int(os.environ["SLURM_LOCALID"])
    return str(local % len(visible.split(",")) if visible else local)


def _address(node: str) -> str:
    """Of a Slurm node, whose name need not be a host's."""
    try:
        return str(socket.getaddrinfo(node, None)[0][4][0])
    except OSError:
        described = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
        return described[1] if described else node


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60, encoding="utf-8"
        ).stdout
    except FileNotFoundError:
        raise UserError("there is no scontrol to ask where rank 0 is; set RANK, WORLD_SIZE, … yourself") from None
    except subprocess.SubprocessError as error:
        raise ConnectionError(f"scontrol does not answer where rank 0 is: {error}") from None


def die_with_parent() -> None:
    """In a child: be asked to end (SIGTERM) when the parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def spawn(arguments: Sequence[str], ranks: int) -> int:
    """Run `mmdit ARGUMENTS` as `ranks` processes on this machine and wait; the exit code of the first that failed.

    When one ends with an error the others are ended too, so that none waits in a collective for ever.
    """
    from stack.dist import VARIABLES, free_port

    port, threads = free_port(), max(1, (os.cpu_count() or 1) // ranks)
    with ExitStack() as open_files:
        outputs: list[BinaryIO | None] = [None]  # rank 0 speaks; what another one said is shown if it failed first
        outputs += [open_files.enter_context(tempfile.TemporaryFile()) for _ in range(1, ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            values = (str(rank), str(ranks), str(rank), "127.0.0.1", str(port))
            environment = {**MALLOC, "OMP_NUM_THREADS": str(threads), **os.environ}
            environment.update(zip(VARIABLES, values, strict=True))
            command = [sys.executable, "-m", "launch.cli", *arguments]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=die_with_parent)
            )
        failed = _wait(processes)
        if failed is None:
            return 0
        output, code = outputs[failed], processes[failed].returncode
        if output is not None and code not in (STOPPED, -signal.SIGTERM):
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()[-20:]
            click.echo("\n".join(f"[rank {failed}] {line}" for line in lines), err=True)
        return code if code > 0 else 128 - code


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed first, None if all ended well. A signal to this process is passed on to the ranks."""

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    failed: int | None = None
    try:
        while any(p.poll() is None for p in processes):
            for rank, process in enumerate(processes):
                if process.poll() not in (None, 0) and failed is None:
                    failed = rank
                    _end([p for p in processes if p.poll() is None], grace=20 if process.returncode == STOPPED else 5)
            time.sleep(0.05)
        codes = [p.returncode for p in processes]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
        return failed
    except KeyboardInterrupt:
        _end(processes, grace=5)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for s, handler in before.items():
            signal.signal(s, handler)


def _end(processes: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Wait a little for processes that are ending by themselves, then kill."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
