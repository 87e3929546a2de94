"""slurm/local: a cluster of its own, and nobody else's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "slurm" / "local"


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LOCAL / script, *arguments], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("file", ["slurm.conf", "something.txt"])
def test_a_folder_with_something_else_in_it_is_refused(tmp_path, file):
    (tmp_path / file).write_text("ClusterName=production\n")
    done = run("up.sh", MMDIT_SLURM=str(tmp_path))
    assert done.returncode == 1
    assert "give MMDIT_SLURM another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "ClusterName=production\n"


def test_down_leaves_a_process_alone_that_is_not_its_daemon(tmp_path):
    """A pid file outlives a killed daemon, and its number goes to another process."""
    with subprocess.Popen(["sleep", "60"]) as other:
        for daemon in ("munged", "slurmctld", "slurmd.n1"):
            (tmp_path / f"{daemon}.pid").write_text(f"{other.pid}\n")
        assert run("down.sh", MMDIT_SLURM=str(tmp_path)).returncode == 0
        assert other.poll() is None
        other.kill()


@pytest.mark.slurm
def test_a_second_cluster_is_refused(tmp_path):
    done = run("up.sh", MMDIT_SLURM=str(tmp_path / "second"))
    assert done.returncode == 1
    assert "is taken" in done.stderr
    assert not (tmp_path / "second").exists()
