"""How workers share a job: each shard once, one job per folder, and nothing that was damaged ends in a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import claims
from stack.claims import Claims
from stack.config import UserError, fingerprint_of
from stack.files import place, temporary_name
from stack.preencode.share import Share
from stack.preencode.stats import finished

NOBODY = 2**22 + 1  # beyond the kernel's largest process id
SETTINGS = {"dtype": "bfloat16", "text": {"pad": "trim", "t5_max_tokens": 77}, "source": "0f" * 32}


def share(out: Path, number: int = 4, **settings: Any) -> Share:
    values = {**SETTINGS, **settings}
    return Share(out, [out / f"{shard:05}.tar" for shard in range(number)], values, fingerprint_of(values))


def stats_of(job: Share, **values: Any) -> dict[str, Any]:
    whole = {"mark": job.mark, "samples": 2, "sha256": "0" * 64, "positions": 8, "buckets": [2, 0]}
    return {**whole, "sum": [0.5, 1.0], "squares": [1.0, 2.0], "rejected": [], **values}


def encode(job: Share, shard: int, **values: Any) -> dict[str, Any]:
    """In place of encoders."""
    stats = stats_of(job, **values)
    job.targets[shard].touch()
    (job.out / f"{shard:05}_stats.json").write_text(json.dumps(stats))
    return stats


def test_each_shard_is_encoded_once_by_all_workers_together(tmp_path):
    encoded: Counter[int] = Counter()
    jobs = [share(tmp_path, 150) for _ in range(4)]

    def work(job: Share) -> None:
        with job.working():
            for shard in job.turns():
                encoded[shard] += 1
                job.done(shard, encode(job, shard))

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoded == Counter(range(150))
    assert all(sorted(job.finished) == list(range(150)) and not job.left for job in jobs)
    assert list((tmp_path / ".claims").iterdir()) == []


def test_a_lone_worker_goes_in_order_and_one_that_meets_others_begins_far_from_them(tmp_path):
    job = share(tmp_path, 100)
    with job.working():
        turns = job.turns()
        for shard in range(3):
            assert next(turns) == shard
            job.done(shard, encode(job, shard))
        assert next(turns) == 3  # which it has in hand now
        other = share(tmp_path, 100)
        with other.working():
            others_turns = other.turns()
            assert 28 <= next(others_turns) < 76
            others_turns.close()
        turns.close()


@pytest.mark.parametrize("finished_one", [False, True])
def test_a_worker_with_other_settings_is_refused_with_both_values(tmp_path, finished_one):
    job = share(tmp_path)
    with job.working():
        if finished_one:
            encode(job, 0)
        with pytest.raises(UserError) as refusal, share(tmp_path, text={"pad": "full", "t5_max_tokens": 77}).working():
            pass
        assert "text.pad is 'trim' there, 'full' here" in str(refusal.value)
        assert "dtype" not in str(refusal.value)
        assert "\n" not in str(refusal.value)
        with share(tmp_path).working():
            pass  # one of the same job is welcome


def test_a_folder_is_free_again_when_a_job_ended_without_a_shard(tmp_path):
    with pytest.raises(RuntimeError), share(tmp_path).working():
        raise RuntimeError
    with share(tmp_path, dtype="float32").working():
        pass
    assert list((tmp_path / ".claims").iterdir()) == []


def test_a_job_that_was_killed_without_a_shard_does_not_block_the_folder(tmp_path):
    """Whatever is left: its claims, or halves of them."""
    folder = tmp_path / ".claims"
    folder.mkdir()
    dead = {"host": "here", "place": place(), "pid": NOBODY, "started": 0.0, "note": SETTINGS}
    for name in (f".worker.{share(tmp_path).mark[:16]}.0", ".entrance", "00001"):
        (folder / name).write_text(json.dumps(dead))
    job = share(tmp_path, dtype="float32")
    with job.working():
        assert [path.name for path in folder.iterdir()] != []
        assert not (folder / "00001").exists()  # should it wake up, it does not publish
        encode(job, 0)
    with pytest.raises(UserError, match="made from other sources, encoders or settings"):
        share(tmp_path)


def test_of_two_jobs_that_begin_at_once_one_is_admitted(tmp_path):
    for attempt in range(15):
        out, inside, barrier = tmp_path / str(attempt), [], threading.Barrier(4)
        refused: list[str] = []

        def work(job: Share, out=out, inside=inside, barrier=barrier, refused=refused) -> None:
            barrier.wait()
            try:
                with job.working():
                    inside.append(job.mark)
                    barrier.wait(timeout=30)
            except UserError as error:
                refused.append(str(error))
                barrier.wait(timeout=30)

        jobs = [share(out, dtype=dtype) for dtype in ("bfloat16", "float32") * 2]
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(inside)) == 1
        assert (len(inside), len(refused)) == (2, 2)


def test_who_was_suspended_until_taken_for_dead_does_not_publish(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_beat", lambda hearts, done: None)
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.0)
    job = share(tmp_path)
    with job.working():
        turns = job.turns()
        shard = next(turns)
        assert job.may_publish(shard)
        (tmp_path / ".claims" / f"{shard:05}").unlink()  # by another one of the same job
        assert not job.may_publish(shard)
        shutil.rmtree(tmp_path / ".claims")
        refused = pytest.raises(UserError, match="dtype is 'float32' there, 'bfloat16' here")
        with share(tmp_path, dtype="float32").working(), refused:
            job.may_publish(shard)
        turns.close()


def test_what_dead_workers_left_is_swept(tmp_path):
    half = temporary_name(tmp_path / "00070.tar")
    dead = half.with_name(half.name.replace(f".{os.getpid()}.", f".{NOBODY}."))
    for path in (half, dead):
        path.touch()
    job = share(tmp_path, 100)
    with job.working():
        next(turns := job.turns())
        assert (half.exists(), dead.exists()) == (True, False)
        turns.close()
    dead.touch()
    job.clean()
    assert (half.exists(), dead.exists()) == (True, False)


DAMAGE = {
    "samples": "2",
    "sha256": None,
    "positions": 0,
    "sum": [[0.5], [1.0, 2.0]],
    "squares": [1.0],
    "buckets": None,
    "rejected": ["x"],
}


def test_damaged_stats_are_those_of_a_shard_that_is_not_finished(tmp_path):
    job = share(tmp_path)
    assert finished(stats_of(job)) is not None
    assert finished(stats_of(job, samples=0, positions=0, sum=0.0, squares=0.0, buckets=[0, 0])) is not None
    for name, value in DAMAGE.items():
        assert finished(stats_of(job, **{name: value})) is None, name
        assert finished({key: part for key, part in stats_of(job).items() if key != name}) is None, name
    encode(job, 0)
    encode(job, 1, samples=True)
    for shard, data in ((2, b'{"mark": "'), (3, b"\xff\xfe")):
        (tmp_path / f"{shard:05}.tar").touch()
        (tmp_path / f"{shard:05}_stats.json").write_bytes(data)
    assert list(share(tmp_path).left) == [1, 2, 3]


def test_stats_that_cannot_be_read_are_one_line_with_the_remedy(tmp_path):
    (tmp_path / "00002.tar").touch()
    (tmp_path / "00002_stats.json").mkdir()
    with pytest.raises(UserError, match=r"00002_stats.json: cannot be read \(Is a directory\): .*, or remove it"):
        share(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / ".claims").touch()
    with pytest.raises(UserError, match=r"\.claims: not a folder; remove it"), share(tmp_path).working():
        pass


def test_an_error_of_the_disk_is_not_taken_for_an_unfinished_shard(tmp_path, monkeypatch):
    encode(share(tmp_path), 0)

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        share(tmp_path)


def test_damaged_claims_stats_and_manifest_end_in_no_traceback(stage, mmdit, tmp_path):
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    out, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**values, "out": str(out)}))
    shutil.copytree(stage.encoded, out)
    whole = {path.name: path.read_bytes() for path in out.glob("*_stats.json")}
    for manifest, says in ((b"\xff\xfe", "not valid JSON"), (b'{"version": 3}', "'source' is missing"), (None, "read")):
        (out / "manifest.json").unlink()
        if manifest is None:
            (out / "manifest.json").mkdir()
        else:
            (out / "manifest.json").write_bytes(manifest)
        done = mmdit("preencode", config)
        assert done.returncode == 2
        line = done.stderr.strip().splitlines()[-1]
        assert says in line
        assert "remove it and run `mmdit preencode` again, which writes it anew" in line
    (out / "manifest.json").rmdir()
    (out / "00001_stats.json").write_bytes(b"\xff" * 100)
    claim = out / ".claims" / "00001"
    with contextlib.suppress(FileExistsError):
        claim.parent.mkdir()
    claim.write_bytes(b'{"host": ')
    os.utime(claim, (0, 0))
    done = mmdit("preencode", config)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in out.glob("*_stats.json")} == whole
    assert (out / "manifest.json").read_bytes() == (stage.encoded / "manifest.json").read_bytes()
    assert Claims(out / ".claims").names() == set()
