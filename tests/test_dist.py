"""The process group: which variables are enough, and who waits for whom."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stack import dist
from stack.config import UserError
from stack.dist import VARIABLES


@pytest.fixture
def given(monkeypatch):
    def install(variables: str) -> None:
        for name in (*VARIABLES, "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        for pair in variables.split():
            name, _, value = pair.partition("=")
            monkeypatch.setenv(name, value)

    return install


MASTER = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29511"


@pytest.mark.parametrize(
    ("variables", "rank", "local_rank"),
    [
        ("", "0", "0"),
        ("WORLD_SIZE=1", "0", "0"),
        ("LOCAL_RANK=0", "0", "0"),
        (MASTER, "0", "0"),
        ("RANK= WORLD_SIZE=", "0", "0"),
        ("RANK=0 WORLD_SIZE=1", "0", "0"),
        (f"RANK=0 WORLD_SIZE=1 {MASTER}", "0", "0"),
        (f"RANK=3 WORLD_SIZE=4 {MASTER}", "3", "0"),
        (f"RANK=3 WORLD_SIZE=4 SLURM_LOCALID=1 {MASTER}", "3", "1"),
        (f"RANK=3 WORLD_SIZE=4 LOCAL_RANK=2 {MASTER}", "3", "2"),
    ],
)
def test_variables_that_follow_from_the_others(given, monkeypatch, variables, rank, local_rank):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    given(variables)
    found = dist._missing_variables()
    whole = {**found, **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)}}
    assert whole.keys() == set(VARIABLES)
    assert (whole["RANK"], whole["LOCAL_RANK"]) == (rank, local_rank)
    assert not {name for name in found if os.environ.get(name)}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ("RANK=0", "RANK set, but not WORLD_SIZE"),
        (f"WORLD_SIZE=2 {MASTER}", "but not RANK: set all of"),
        ("RANK=1 WORLD_SIZE=2", "but not MASTER_ADDR, MASTER_PORT"),
        (f"RANK=5 WORLD_SIZE=2 {MASTER}", "expected a RANK of 0 … 1"),
        ("RANK=1 WORLD_SIZE=1", "expected a RANK of 0 … 0"),
        (f"RANK=abc WORLD_SIZE=2 {MASTER}", "RANK=abc: expected a whole number"),
        (f"RANK=-1 WORLD_SIZE=2 {MASTER}", "RANK=-1: expected a whole number"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE=two: expected"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=x", "MASTER_PORT=x: expected"),
        (f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={2**16}", "expected a port of 1 … 65535"),
    ],
)
def test_variables_that_are_not_enough_are_a_mistake(given, variables, says):
    given(variables)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        dist._missing_variables()
    assert says in str(caught.value)


def test_which_of_several_gpus_is_not_guessed(given, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    given(f"RANK=3 WORLD_SIZE=4 {MASTER}")
    with pytest.raises(UserError, match="which of this machine's 8 GPUs is rank 3's"):
        dist._missing_variables()


def test_a_local_rank_that_is_no_number(given):
    given("LOCAL_RANK=x")
    with pytest.raises(UserError, match="LOCAL_RANK=x"):
        dist.local_rank()


BARRIER = """
import os, sys, time
from stack import dist
dist.init(timeout_minutes=0.05)
if dist.rank() == 0:
    time.sleep(6)
    if "die" in sys.argv:
        os._exit(3)
dist.barrier()
dist.shutdown()
"""


@pytest.mark.parametrize("arguments", [[], ["die"]])
def test_rank_0_may_take_longer_than_a_collective(arguments):
    port = str(dist.free_port())
    processes = []
    for rank in ("0", "1"):
        values = dict(zip(VARIABLES, (rank, "2", rank, "127.0.0.1", port), strict=True))
        command = [sys.executable, "-c", BARRIER, *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **values}, stderr=subprocess.DEVNULL))
    codes = [process.wait(60) for process in processes]
    assert codes == [0, 0] if not arguments else codes[0] == 3 and codes[1] != 0
