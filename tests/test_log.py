from __future__ import annotations

import json
import stat

import pytest

from stack.files import publish
from stack.log import LogConfig, Metrics, Tracker, progress, read_metrics


def test_publish_is_all_or_nothing(tmp_path):
    with publish(tmp_path / "a" / "x") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a" / "x").exists()
    assert stat.S_IMODE((tmp_path / "a" / "x").stat().st_mode) == 0o644
    with pytest.raises(RuntimeError), publish(tmp_path / "a" / "x") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    assert (tmp_path / "a" / "x").read_text() == "new"


def test_metrics_of_a_lost_future_are_cut_off(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    metrics = Metrics(tmp_path, LogConfig(wandb="disabled"), resume_step=3, run_id=None, values={})
    metrics.write({"step": 4, "loss": 2.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_wandb_mirrors_offline_and_keeps_its_id(tmp_path):
    metrics = Metrics(tmp_path, LogConfig(wandb="offline"), resume_step=0, run_id="kept0001", values={"a": 1})
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert metrics.run_id == "kept0001"
    assert list((tmp_path / "wandb").glob("offline-run-*kept0001"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{]", b'{"id": ', b"7", b"[]", b"null", b"{}", b'{"id": 7}', b'{"id": ""}', b'{"id": "a/b"}'],
)
def test_a_damaged_id_of_wandb_begins_a_new_run(tmp_path, capsys, content):
    (tmp_path / "wandb.json").write_bytes(content)
    assert Tracker.join(tmp_path, LogConfig(wandb="offline")) is None
    assert "wandb.json" in capsys.readouterr().err


def test_a_folder_in_place_of_the_id_of_wandb_ends_nothing(tmp_path, capsys):
    (tmp_path / "wandb.json").mkdir()
    metrics = Metrics(tmp_path, LogConfig(wandb="offline"), resume_step=0, run_id=None, values={})
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert metrics.run_id is not None
    assert list((tmp_path / "wandb").glob(f"offline-run-*{metrics.run_id}"))
    assert "wandb.json" in capsys.readouterr().err


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress("work", 4, "sample", done=1) as advance:
        advance(2)
        advance(1, "loss 0.5")
    out = capsys.readouterr().err
    assert "work 4/4" in out
    assert "loss 0.5" in out
