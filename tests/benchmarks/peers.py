"""Contenders as worker processes; a peer whose pins clash with ours has an environment of its own, made on demand."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

CONTENDERS = Path(__file__).with_name("contenders.py")
REQUIREMENTS = {
    "litdata": "litdata==0.2.76",
    "mosaicml-streaming": "mosaicml-streaming==0.13.0",
    "webshart": "webshart==0.4.6",
}
INSTALL_SECONDS = 900


class NotInstalledError(Exception):
    """Why a peer's environment could not be made."""


class Pass(NamedTuple):
    seconds: float
    processor: float
    """Seconds of processor time, of all threads."""


def interpreter(peer: str, cache: Path) -> Path:
    """The Python that runs `peer`: this one, or that of its own environment in `cache`. Raises NotInstalledError.

    The environment sees this one's packages behind its own, so torch and what else fits is there only once.
    """
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    folder = cache.resolve() / peer
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    ours = sysconfig.get_path("purelib")
    wanted = f"{REQUIREMENTS[peer]}\n{ours}\n"
    if marker.exists() and marker.read_text() == wanted and python.exists():
        return python
    print(f"installing {REQUIREMENTS[peer]} in {folder}", file=sys.stderr)
    try:
        venv.create(folder, clear=True, symlinks=True)
        site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (site / "ours.pth").write_text(f"{ours}\n")
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", REQUIREMENTS[peer]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotInstalledError(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotInstalledError(" ".join(lines[-2:]))
    marker.write_text(wanted)
    return python


class Worker:
    """A contender in its process, which waits between the passes that it is asked for.

    Raises RuntimeError with the end of its output where the process dies.
    """

    def __init__(self, python: Path, contender: str, source: Path, copy: Path):
        self._command = [str(python), str(CONTENDERS), contender, str(source.resolve()), str(copy.resolve())]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """Write the contender's own form of the data."""
        done = subprocess.run([*self._command, "prepare"], stdin=subprocess.DEVNULL, stderr=self._errors)
        if done.returncode:
            raise self._failure()

    def check(self) -> dict[str, int]:
        return self._ask("check")

    def once(self) -> Pass:
        return Pass(**self._ask("pass"))

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def _ask(self, word: str) -> dict:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(word, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise self._failure()
        return json.loads(answer)

    def _failure(self) -> RuntimeError:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return RuntimeError(f"{self._command[2]} failed: {' | '.join(lines[-3:])}")
