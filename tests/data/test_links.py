"""Links, in archives and on the disk: none leads reading or writing to a file that the user did not name.

A shard that is itself a link is read: people lay out data sets by linking, and the folder is one that the user named.
A link where a file is to be written is replaced by the file, and what it led to stays as it was.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from stack.claims import Claims
from stack.config import UserError
from stack.data.index import SUFFIX, ShardIndex, build_index
from stack.data.remote import CacheConfig, ShardCache, Stat
from stack.data.shards import ShardReader, index_shards
from stack.files import publish, temporary_name


@pytest.fixture
def foretold(monkeypatch) -> None:
    """Temporary names are the same each time, as if someone had guessed what is drawn."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file that nothing may read into a sample or write to."""
    path = tmp_path / "secret"
    path.write_bytes(b"a caption that is a secret")
    return path


@pytest.fixture
def shards(tmp_path, pack, sample) -> Path:
    members = [member for number in range(4) for member in sample(f"s{number}", number)]
    pack(tmp_path / "shards" / "00000.tar", members)
    return tmp_path / "shards"


SPECIAL = {
    "soft": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "contiguous": b"9",
}


def test_special_members_of_a_tar_cost_their_sample_and_lead_nowhere(mmdit, stage, tmp_path, secret, sample, listed):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00000.tar", "w") as tar:
        for key in ("good0", *SPECIAL, *(f"good{number}" for number in range(1, 12))):
            for name, data in sample(key, 1):
                info = tarfile.TarInfo(name)
                if name.endswith("txt") and key in SPECIAL:
                    info.type, info.linkname, info.devmajor, info.devminor = SPECIAL[key], str(secret), 1, 5
                    tar.addfile(info)
                    continue
                info.size = len(data)
                with (tmp_path / "data").open("w+b") as file:
                    file.write(data)
                    file.seek(0)
                    tar.addfile(info, file)
    options = (f"source={tmp_path}/shards", f"out={tmp_path}/out", "max_rejected=1")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert done.returncode == 0, done.stderr
    rejected = listed(tmp_path / "out" / "rejected.jsonl")
    kinds = {key: reason.partition(":")[0] for key, reason in rejected.items()}
    assert kinds == dict.fromkeys(SPECIAL, "caption not a file")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert not any(b"secret" in tar.extractfile(member).read() for member in tar)


def test_a_shard_that_is_a_link_is_read_and_its_index_stands_beside_the_link(tmp_path, shards):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.tar").symlink_to(shards / "00000.tar")
    [index] = index_shards(tmp_path / "linked")
    assert len(index) == 4
    assert ShardReader([index]).read(0, 1, "txt") == b"a picture of number 1"
    assert sorted(path.name for path in (tmp_path / "linked").iterdir()) == [f"a{SUFFIX}", "a.tar"]
    assert [path.name for path in shards.iterdir()] == ["00000.tar"]


def test_links_of_one_name_into_one_folder_have_indices_of_their_own(tmp_path, pack, sample):
    """In a folder for indices a shard's is found by where the link stands."""
    for name, count in (("a", 1), ("b", 2)):
        members = [member for number in range(count) for member in sample(str(number), number)]
        pack(tmp_path / "pool" / f"{name}.tar", members)
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.tar").symlink_to(tmp_path / "pool" / f"{name}.tar")
    for _ in range(2):
        assert [len(index_shards(tmp_path / name, tmp_path / "index")[0]) for name in ("a", "b")] == [1, 2]


def test_a_link_that_leads_nowhere_is_one_line(mmdit, tmp_path):
    (tmp_path / "x.tar").symlink_to(tmp_path / "gone")
    done = mmdit("data", "index", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr, "x.tar" in done.stderr) == (2, False, True)


def test_an_output_folder_that_is_a_link_is_written_to(mmdit, stage, tmp_path, shards):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={shards}", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert {"00000.tar", "manifest.json"} <= {path.name for path in (tmp_path / "disk").iterdir()}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_an_output_that_leads_to_the_source_is_refused(kind, mmdit, stage, tmp_path, shards):
    before = (shards / "00000.tar").read_bytes()
    if kind == "folder":
        (tmp_path / "out").symlink_to(shards)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "00000.tar").symlink_to(shards / "00000.tar")
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={shards}", f"out={tmp_path}/out")
    assert (done.returncode, "would be overwritten" in done.stderr) == (2, True)
    assert (shards / "00000.tar").read_bytes() == before


@pytest.mark.usefixtures("foretold")
def test_links_planted_where_pre_encoding_writes_are_not_followed(mmdit, stage, tmp_path, shards, secret):
    out, index, before = tmp_path / "out", tmp_path / "index", secret.read_bytes()
    index_shards(shards, index)
    [beside] = index.rglob(f"*{SUFFIX}")
    names = [f"00000{SUFFIX}", "00000_stats.json", "manifest.json", "rejected.jsonl", "00000.tar"]
    drafts = [temporary_name(path) for path in (*(out / name for name in names), out / ".claims" / "00000")]
    finals = [out / name for name in names if name != "manifest.json"]
    for path in (*drafts, *finals, beside, temporary_name(beside)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    options = (f"source={shards}", f"out={out}", f"index={index}")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert secret.read_bytes() == before
    assert secret.stat().st_mode & 0o777 == 0o644
    assert not any(path.is_symlink() for path in (*finals, beside))
    assert (len(build_index(out / "00000.tar")), len(ShardIndex("", beside))) == (4, 4)


@pytest.mark.usefixtures("foretold")
def test_links_planted_where_training_writes_are_not_followed(mmdit, stage, tmp_path, shards, secret):
    run, before = tmp_path / "run", secret.read_bytes()
    names = ["config.yaml", "metrics.jsonl", "samples/00000001.png", "snapshots/00000001.safetensors"]
    for name in names:
        for path in (run / name, temporary_name(run / name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(secret)
    (run / "rejected.jsonl").symlink_to(secret)
    bad = tmp_path / "shards" / "00001.tar"
    with tarfile.open(bad, "w") as tar:
        tar.addfile(tarfile.TarInfo("bad.png"))
    options = (f"run.dir={run}", f"data.source={shards}", "data.max_rejected=0.5", "data.batch_size=2")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options, "schedule.steps=1", "data.validation_share=0")
    assert done.returncode == 0, done.stderr
    assert secret.read_bytes() == before
    assert not any((run / name).is_symlink() for name in (*names, "rejected.jsonl"))


@pytest.mark.usefixtures("foretold")
def test_publishing_replaces_a_link_and_leaves_what_it_led_to(tmp_path, secret):
    before = secret.read_bytes()
    for path in (tmp_path / "x", temporary_name(tmp_path / "x")):
        path.symlink_to(secret)
    with publish(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert ((tmp_path / "x").read_text(), (tmp_path / "x").is_symlink()) == ("new", False)
    assert secret.read_bytes() == before


@pytest.mark.usefixtures("foretold")
def test_a_claim_is_not_written_through_a_link(tmp_path, secret):
    before = secret.read_bytes()
    claims = Claims(tmp_path / "claims")
    for name in ("00000", "clock"):
        temporary_name(tmp_path / "claims" / name).symlink_to(secret)
    stat = secret.stat()
    with claims.hold("00000") as mine:
        assert mine
    (tmp_path / "claims" / "00001").symlink_to(secret)
    with claims.hold("00001") as mine:
        assert not mine  # someone's, as far as one can tell
    assert (secret.read_bytes(), secret.stat().st_mtime_ns) == (before, stat.st_mtime_ns)


def test_a_cache_folder_that_another_user_made_is_refused(tmp_path, monkeypatch):
    """Its name in the shared temporary folder can be told in advance."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"mmdit-cache-{os.getuid()}"
    folder.mkdir()
    monkeypatch.setattr(Path, "lstat", lambda path: os.stat_result((0o40755, 0, 0, 1, os.getuid() + 1, *[0] * 5)))
    with pytest.raises(UserError, match="another user made this folder"):
        ShardCache(CacheConfig()).open("https://host/x.tar", Stat(1, ""))
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
