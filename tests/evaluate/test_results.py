"""RUN/eval.jsonl: a line per result, whoever measured it, and whatever happens meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stack.claims import Claims
from stack.config import UserError
from stack.evaluate import results as module
from stack.evaluate.results import Results

ROOT = Path(__file__).parents[2]


def opened(run: Path) -> Results:
    return Results(run, Claims(run / "snapshots" / ".claims"))


def result(step: int, loss: float = 1.0, seed: int = 0, **more: object) -> dict:
    return {"step": step, "val_loss": loss, "settings": {"seed": seed}, **more}


def add(results: Results, value: dict, mark: str = "0123456789ab") -> None:
    results.publish(value, mark)
    results.append(value)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_lines_are_appended_and_replaced(tmp_path):
    results = opened(tmp_path)
    for step in (3, 1, 2):
        add(results, result(step))
    assert [line["step"] for line in lines(tmp_path)] == [3, 1, 2]
    add(results, result(1, seed=1), "another mark")
    add(results, result(1, loss=0.5))
    add(opened(tmp_path), result(3, loss=0.25))
    add(results, result(2))
    assert sorted((line["step"], line["settings"]["seed"], line["val_loss"]) for line in lines(tmp_path)) == [
        (1, 0, 0.5), (1, 1, 1.0), (2, 0, 1.0), (3, 0, 0.25),
    ]  # fmt: skip
    results.gather()
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 3]


def test_the_cost_of_a_line_does_not_grow_with_the_results(tmp_path, monkeypatch):
    first, second = opened(tmp_path), opened(tmp_path)
    for step in range(20):
        add((first, second)[step % 2], result(step))
    read = []
    monkeypatch.setattr(module, "read", lambda path: read.append(path))
    inode = (tmp_path / "eval.jsonl").stat().st_ino
    for step in range(20, 40):
        add((first, second)[step % 2], result(step))
    assert not read
    assert (tmp_path / "eval.jsonl").stat().st_ino == inode
    assert [line["step"] for line in lines(tmp_path)] == list(range(40))


def test_a_result_whose_evaluator_died_gets_its_line(tmp_path):
    results = opened(tmp_path)
    add(results, result(1))
    opened(tmp_path).publish(result(2), "0123456789ab")  # and no line
    add(results, result(3))
    opened(tmp_path).gather()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    add(results, result(2))  # the first one was stopped in between, not dead
    add(results, result(4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_gathering_changes_nothing_where_nothing_is_new(tmp_path):
    """A job that writes is taken for one that gets on."""
    opened(tmp_path).gather()
    assert not (tmp_path / "eval.jsonl").exists()
    add(opened(tmp_path), result(1))
    before = (tmp_path / "eval.jsonl").stat()
    opened(tmp_path).gather()
    after = (tmp_path / "eval.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe\x00", b"{}\n", b"[]\n", b"null\n", b"\n\n", b"[" * 100_000, b'{"step": "x", "settings": {}}\n',
        b'{"step": 1, "val_loss": 1.0, "settings": {"seed": 0}}\n{"step": 2, "val_l',
        b'{"step": 1, "val_loss": 1.0, "settings": {"seed": 0}}',
    ],
)  # fmt: skip
def test_a_damaged_list_is_written_anew(tmp_path, content):
    for known in (True, False):  # by an evaluator that has read it before, and by one that has not
        results = opened(tmp_path)
        add(results, result(1))
        if not known:
            results = opened(tmp_path)
        (tmp_path / "eval.jsonl").write_bytes(content)
        add(results, result(2))
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"[]", b"null", b'{"step": 1}', b'{"step": [], "settings": 1}', b"[" * 100_000, None]
)
def test_a_damaged_result_is_left_out_and_named(tmp_path, capsys, content):
    results = opened(tmp_path)
    add(results, result(1))
    damaged = results.place(2, "0123456789ab")
    damaged.parent.mkdir()
    damaged.mkdir() if content is None else damaged.write_bytes(content)
    results.gather()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert f"{damaged}: damaged, left out" in capsys.readouterr().err
    if content is None:
        with pytest.raises(UserError, match="a folder is in the place of a result; remove it"):
            results.check_place(2, "0123456789ab")
    else:
        add(results, result(2))
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_in_the_way_is_named(tmp_path):
    results = opened(tmp_path)
    (tmp_path / "eval.jsonl").mkdir()
    results.publish(result(1), "0123456789ab")
    with pytest.raises(IsADirectoryError):
        results.append(result(1))
    with pytest.raises(UserError, match=r"eval\.jsonl: cannot be written, remove what is there"):
        results.gather()
    (tmp_path / "eval" / "00000002").write_text("")
    with pytest.raises(UserError, match="a file is in the place of a folder of results; remove it"):
        results.check_place(2, "0123456789ab")


EVALUATOR = """
import sys
from pathlib import Path
from stack.claims import Claims
from stack.evaluate.results import Results

run, first = Path(sys.argv[1]), int(sys.argv[2])
results = Results(run, Claims(run / "snapshots" / ".claims"))
for step in range(first, first + 20):
    result = {"step": step, "val_loss": 1.0, "settings": {}}
    results.publish(result, "0123456789ab")
    results.append(result)
    if step % 10 == 5:
        results.gather()
"""


def test_several_evaluators_lose_and_repeat_nothing(tmp_path):
    evaluators = [
        subprocess.Popen([sys.executable, "-c", EVALUATOR, str(tmp_path), str(first)], cwd=ROOT)
        for first in (0, 100, 200)
    ]
    assert [evaluator.wait(timeout=120) for evaluator in evaluators] == [0, 0, 0]
    assert sorted(line["step"] for line in lines(tmp_path)) == [
        *range(20),
        *range(100, 120),
        *range(200, 220),
    ]


@pytest.mark.slow
def test_five_thousand_results(tmp_path):
    """Linear: the second half takes as long as the first."""
    results, seconds = opened(tmp_path), []
    for half in range(2):
        began = time.process_time()
        for step in range(2500 * half, 2500 * (half + 1)):
            add(results, result(step, text="x" * 1000))
        seconds.append(time.process_time() - began)
    assert len(lines(tmp_path)) == 5000
    assert seconds[1] < 1.5 * seconds[0] + 0.1
