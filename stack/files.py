"""How files of this stack come to be: written under a temporary name and renamed, or copied; locks that die with their
holder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<place>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
"""Names that `temporary_name` gives."""


def place() -> str:
    """A digest of where process ids mean the same: this host, since it started, and in it this container."""
    told = [socket.gethostname()]  # which containers may share
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
    with suppress(OSError):
        told.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer of it has, and that tells which process this one is."""
    return path.with_name(f".{path.name}.{place()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that stands at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def probe(path: Path) -> None:
    """Open `path` for reading and close it. Raises OSError, where a library reports any error as a missing file."""
    with path.open("rb"):
        pass


def create(path: Path) -> BinaryIO:
    """An empty file at `path`, to write and read, in place of whatever was there: no link is followed."""
    path.unlink(missing_ok=True)
    return path.open("x+b")


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`; on success it is renamed to `path` with mode 0644, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        create(temporary).close()
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove temporary files of `publish` that a killed process left: those of the files `names`, or all.

    Only for whoever alone publishes them. What cannot be removed stays.
    """
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and (names is None or match["name"] in names):
            with suppress(OSError):
                path.unlink()


def copy_model(source: Path, out: Path, stem: str) -> None:
    """config.json and the safetensors called `stem`, one or those that its index names, into the folder `out`."""
    index, names = f"{stem}.safetensors.index.json", ["config.json"]
    if (source / index).is_file() and not (source / f"{stem}.safetensors").is_file():
        names += [index, *sorted(set(json.loads((source / index).read_text(encoding="utf-8"))["weight_map"].values()))]
    else:
        names.append(f"{stem}.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / Path(name).name, out / Path(name).name)


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """True if this process alone holds `path`; the kernel releases it when this process and those it forked are dead.

    The file names its holder, for `is_remainder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with suppress(OSError):  # a full disk
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps({"place": place(), "pid": os.getpid(), "job": _job()}).encode(), 0)
        yield True
    finally:
        os.close(handle)


def is_remainder(path: Path) -> bool:
    """Whether the lock `path` is held by what is left of an earlier life of this job, or of a process that died here.

    Such a holder is about to end: loader processes notice some seconds after their rank that it has died, and Slurm
    may start a job's next life beside the last one, on a node that it has lost sight of.
    """
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        job, pid = holder["job"], int(holder["pid"])
        here = holder["place"] == place()
        if job is not None and job == _job():
            return not (here and pid == os.getpid())
        return here and not _lives(pid)
    except (ValueError, KeyError, TypeError):  # empty, or of another version
        return False


def _job() -> str | None:
    """The batch job that this process belongs to; the same in each of the job's lives."""
    for name in ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID"):
        if number := os.environ.get(name):
            return f"{name}={number}"
    return None


def _lives(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
