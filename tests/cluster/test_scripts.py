"""The text of the batch scripts: what they run, and what they do after it. What Slurm makes of it: test_slurm.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import MALLOC

ROOT = Path(__file__).parents[2]
JOBS = ["train_mmdit", "train_autoencoder", "preencode", "evaluate"]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").rglob("*.sh"))
# Writes down how it was called, and ends as the next word of $ENDS says, having said so as a rank does.
SRUN = """#!/usr/bin/env bash
for argument in "$@"; do case $argument in --output=*) log=${argument#--output=};; esac; done
echo "a rank's words" >"${log//%t/0}"
echo "srun $*" >>"$CALLS"
env | grep -E '^(OMP_NUM_THREADS|MALLOC_)' | sort >"$CALLS.env"
read -r code <"$ENDS"
sed -i 1d "$ENDS"
case $code in 2 | 85) echo "$code 0" >"$MMDIT_FIRST_EXIT" && exit 143 ;; esac
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
[ "$1" = show ] && echo "JobId=7 JobState=$STATE Reason=None Requeue=1 Restarts=$RESTARTS BatchFlag=1"
exit 0
"""


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_parses(path):
    subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck: pip install -e '.[dev]'")
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        [SHELLCHECK, "-x", "-P", "SCRIPTDIR", *SCRIPTS, "slurm/cluster.env"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def batch(tmp_path):
    """A function that runs a script as a batch job would, with an srun and a scontrol that write down their calls."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "slurm", repository / "slurm", ignore=shutil.ignore_patterns("logs"))
    (repository / "slurm" / "logs").mkdir()
    (repository / "stack").symlink_to(ROOT / "stack")
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "activate").touch()

    def run(name, *arguments, ends=(0,), state="RUNNING", restarts=0, **variables):
        spooled = tmp_path / "slurm_script"  # sbatch runs a copy
        shutil.copy(ROOT / "slurm" / f"{name}.sh", spooled)
        calls, codes = tmp_path / "calls", tmp_path / "ends"
        codes.write_text("".join(f"{code}\n" for code in ends))
        calls.touch()
        environment = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        environment |= {"PATH": f"{bin}:{os.environ['PATH']}", "CALLS": str(calls), "ENDS": str(codes)}
        environment |= {"STATE": state, "RESTARTS": str(restarts)}
        environment |= {"SLURM_SUBMIT_DIR": str(repository), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": name}
        environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", **variables}
        done = subprocess.run(
            ["bash", spooled, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines()

    return run


STEP = "--kill-on-bad-exit=1 --open-mode=append --output=slurm/logs"


def test_one_rank_a_node_without_gpus(batch, tmp_path):
    done, calls = batch("train_mmdit", "configs/x.yaml", "optim.lr=1e-4", 'name="two words"')
    assert done.returncode == 0, done.stderr
    assert calls == [
        f"srun --nodes=2 --ntasks=2 --ntasks-per-node=1 {STEP}/train_mmdit-7-%t.log "
        'python -m launch.cli train configs/x.yaml optim.lr=1e-4 name="two words"'
    ]
    given = dict(line.split("=") for line in (tmp_path / "calls.env").read_text().splitlines())
    assert given == {**MALLOC, "OMP_NUM_THREADS": "1"}


def test_one_rank_a_gpu(batch):
    _, calls = batch("train_autoencoder", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="12")
    assert calls == [
        f"srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 {STEP}/train_autoencoder-7-%t.log "
        "python -m launch.cli train configs/autoencoder/demo_scenes.yaml"
    ]


def test_ranks_without_gpus_as_sbatch_was_told(batch):
    _, calls = batch("evaluate", "runs/x", "--scenes", "96", SLURM_NTASKS_PER_NODE="4", SLURM_JOB_NUM_NODES="1")
    assert calls == [
        f"srun --nodes=1 --ntasks=4 --ntasks-per-node=4 {STEP}/evaluate-7-%t.log "
        "python -m launch.cli evaluate --watch runs/x --scenes 96"
    ]


def test_a_job_of_an_array_is_named_by_its_task(batch):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NUM_NODES": "1"}
    _, calls = batch("preencode", ends=[85], **array)
    assert f"{STEP}/preencode-5_3-%t.log" in calls[0]
    assert calls[0].endswith("python -m launch.cli preencode configs/preencode/demo_scenes.yaml")
    assert calls[1:] == ["scontrol show job 5_3 --oneliner", "scontrol requeue 5_3"]


def test_a_stopped_run_is_requeued(batch):
    """By what the first rank ended with: srun has the highest code, which is that of a rank that it ended itself."""
    done, calls = batch("train_mmdit", ends=[85])
    assert done.returncode == 85
    assert calls[1:] == ["scontrol show job 7 --oneliner", "scontrol requeue 7"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_a_job_that_slurm_ended_is_left_alone(batch, state):
    done, calls = batch("train_mmdit", ends=[85], state=state)
    assert done.returncode == 85
    assert calls[1:] == ["scontrol show job 7 --oneliner"]


def test_a_life_that_slurm_lost_sight_of_leaves_the_next_one_alone(batch):
    _, calls = batch("train_mmdit", ends=[85], restarts=2, SLURM_RESTART_COUNT="1")
    assert calls[1:] == ["scontrol show job 7 --oneliner"]
    _, calls = batch("train_mmdit", ends=[85], restarts=2, SLURM_RESTART_COUNT="2")
    assert calls[-1] == "scontrol requeue 7"


def test_a_requeue_that_slurm_did_not_hear_is_asked_for_again(batch, tmp_path):
    (tmp_path / "bin" / "sleep").symlink_to("/bin/true")
    deaf_once = '[ "$1" = requeue ] && mkdir "$CALLS.asked" 2>/dev/null && exit 1\nexit 0'
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL.replace("exit 0", deaf_once))
    done, calls = batch("train_mmdit", ends=[85])
    assert calls[1:] == ["scontrol show job 7 --oneliner", "scontrol requeue 7"] * 2
    assert done.stdout.count("requeued") == 1


def test_a_signal_to_all_processes_of_the_script_leaves_it_to_be_requeued(batch, tmp_path):
    """`scancel --full` and its like reach what the script waits with, too."""
    srun = tmp_path / "bin" / "srun"
    ends = "[child.terminate() for child in psutil.Process($PPID).children() if child.name() == 'sleep']"
    srun.write_text(
        srun.read_text().replace("read -r code", f'{sys.executable} -c "import psutil; {ends}"\nread -r code')
    )
    done, calls = batch("train_mmdit", ends=[85])
    assert (done.returncode, calls[-1]) == (85, "scontrol requeue 7"), done.stderr


def test_secrets_of_urls_are_not_in_the_job_s_log(batch):
    url, single = "https://user:secret@host/{0..9}.tar?token=secret", "s3:/key:secret@bucket/x"
    done, calls = batch("preencode", "configs/x.yaml", f"source={url}", f"out={single}", "name=$(touch ran)\nx")
    assert done.returncode == 0, done.stderr
    assert f"source={url} out={single}" in calls[0]  # the rank needs them
    assert "secret" not in done.stdout + done.stderr
    assert "mmdit preencode configs/x.yaml 'source=https://***@host/{0..9}.tar?***'" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_job_s_name_is_no_pattern_of_srun(batch):
    _, calls = batch("preencode", SLURM_JOB_NAME="a/%j b", SLURM_JOB_NUM_NODES="1")
    assert "--output=slurm/logs/a__j_b-7-%t.log" in calls[0]


def test_a_failure_is_tried_again(batch):
    done, calls = batch("train_mmdit", ends=[1, 137, 0])
    assert (done.returncode, len(calls)) == (0, 3)
    assert "exit code 137: again (2 of 3)" in done.stdout


def test_stops_without_a_save_have_an_end(batch, tmp_path):
    """This shell is signalled while srun runs, each time."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text(srun.read_text().replace("read -r code", "trap '' USR1\nkill -USR1 $PPID\nread -r code"))
    for life in range(1, 5):
        done, calls = batch("train_mmdit", ends=[138, 0])
        assert done.returncode == 138
        assert sum(call.startswith("scontrol requeue") for call in calls) == min(life, 3)
    assert "asked to stop 4 times in a row before anything was saved: given up" in done.stdout
    batch("train_mmdit", ends=[85])  # by hand, and it saves
    done, _ = batch("train_mmdit", ends=[138, 0])
    assert "exit code 138: requeued" in done.stdout


def test_failures_have_an_end(batch):
    done, calls = batch("train_mmdit", ends=[1, 1, 1, 9, 0])
    assert (done.returncode, len(calls)) == (9, 4)
    assert "given up" in done.stdout


def test_a_mistake_of_the_user_stops_at_once_and_is_shown(batch):
    done, calls = batch("train_mmdit", ends=[2, 0])
    assert (done.returncode, len(calls)) == (2, 1)
    assert "a rank's words" in done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_script_says_from_where_it_is_to_be_submitted(batch, tmp_path, name):
    done, calls = batch(name, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == f"{tmp_path}: sbatch slurm/{name}.sh in the repository's root\n"


@pytest.mark.parametrize("name", JOBS)
def test_the_header_asks_for_a_warning_and_to_be_requeued(name):
    header = [line for line in (ROOT / "slurm" / f"{name}.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120"} <= set(header)
