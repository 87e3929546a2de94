"""The batch script that `mmdit submit` has submitit write: nothing that a user gives runs in it as shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.submit import Resources, _executor
from stack.config import UserError, validate

HOSTILE = ["a b", "$(touch ran)", "`touch ran`", "'; touch ran; '", '"; touch ran; "', "-x", "#", "a&touch ran", "é→"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder on PATH with an srun that writes its arguments, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        (folder / name).write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$CALLS"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_user_gives_is_no_shell(commands, tmp_path, text):
    resources = Resources(cluster="slurm", partition=text, account=text, qos=text, sbatch={"comment": text})
    folder = tmp_path / text / "jobs"
    script = _executor(folder, resources, "train", 0)._make_submission_file_text("true", "0")
    (tmp_path / "script.sh").write_text(script, encoding="utf-8")
    subprocess.run(["bash", tmp_path / "script.sh"], cwd=tmp_path, check=True)
    called = commands.read_text(encoding="utf-8").splitlines()
    assert str(folder / "%j_%t_log.out") in called
    assert called[-1] == "true"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "calls", "script.sh"]


@pytest.mark.parametrize("text", ["a\nid", "a\r", "a\x1b[2J"])
def test_a_line_break_is_refused(text):
    for values in ({"partition": text}, {"account": text}, {"sbatch": {"comment": text}}, {"sbatch": {text: 1}}):
        with pytest.raises(UserError, match=r"control character|not the name of an option"):
            validate(Resources, values, "mmdit submit")


@pytest.mark.parametrize("text", ["a\nb", "100%j", "a\\b"])
def test_a_folder_that_sbatch_cannot_write_logs_into_is_refused(commands, tmp_path, text):
    with pytest.raises(UserError, match="sbatch cannot write logs"):
        _executor(Path(text) / "jobs", Resources(cluster="slurm"), "train", 0)


def test_a_line_break_in_run_dir_is_refused_before_anything_is_written(mmdit, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stage.train_config("line-break", run={"dir": f"{tmp_path}/a\ntouch {tmp_path}/ran; b"})
    for command in (("train",), ("submit", "train")):
        done = mmdit(*command, config)
        assert (done.returncode, "without line breaks" in done.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_click_error_shows_no_secret(mmdit):
    for command in (("train", "x", "--https://u:secret@h/x"), ("model", "a", "https://u:secret@h/x?t=secret")):
        done = mmdit(*command)
        assert done.returncode == 2
        assert "secret" not in done.stderr
        assert "***" in done.stderr
