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
    """True if this process alone holds `path`; the kernel lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
