"""Files with the name of a tar: several archives in one, something behind the end, compressed ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stack.config import UserError
from stack.data.index import SUFFIX, build_index
from stack.data.lint import lint
from stack.data.shards import index_shards
from stack.data.sources import find


@pytest.fixture
def archive(tmp_path: Path, pack, sample) -> Callable[..., bytes]:
    """A function that returns a tar of samples of these keys."""

    def make(*keys: str, form: int = tarfile.USTAR_FORMAT) -> bytes:
        members = [member for number, key in enumerate(keys) for member in sample(key, number)]
        return pack(tmp_path / "parts" / "one.tar", members, form).read_bytes()

    return make


def without_end(data: bytes) -> bytes:
    """A tar without its end marker and padding."""
    length = len(data.rstrip(b"\0"))
    return data[: length + -length % 512]


def rewrite(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- several archives in one file

LONG = "é" * 90


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("between", ["padding", "end marker", "nothing", "a megabyte of zeros", "an empty archive"])
def test_all_samples_of_concatenated_archives_are_read(tmp_path: Path, archive, form: int, between: str) -> None:
    keys = ("c", "d") if form == tarfile.USTAR_FORMAT else (f"{LONG}1", f"{LONG}2")  # their headers are at the seam
    one, two = archive("a", "b", form=form), archive(*keys, form=form)
    seam = {
        "padding": one,
        "end marker": without_end(one) + bytes(1024),
        "nothing": without_end(one),
        "a megabyte of zeros": one + bytes(2**20),
        "an empty archive": one + bytes(10240),
    }[between]
    index = build_index(rewrite(tmp_path / "x.tar", seam + two + archive("last")))
    assert index.keys == ["a", "b", *keys, "last"]
    assert (index.damage, index.rejected) == ("", [])


def test_commands_agree_on_concatenated_archives(tmp_path: Path, archive, mmdit, stage) -> None:
    data = archive(*"abc") + archive(*"defg")
    (tmp_path / "shards").mkdir()
    rewrite(tmp_path / "shards" / "x.tar", data)
    for command, found in (("index", "7 samples in 1 shards"), ("info", "7 raw samples"), ("lint", "no problem in 7 ")):
        done = mmdit("data", command, tmp_path / "shards")
        assert (done.returncode, found in done.stdout) == (0, True), done.stdout + done.stderr
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={tmp_path}/shards", f"out={tmp_path}/out")
    assert (done.returncode, "7 samples, 0 left out" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("behind", [b"<html>503 Service Unavailable</html>", b"x" * 9000, b"\n", b"\0" * 512 + b"x"])
def test_what_is_no_archive_behind_the_end_is_damage(tmp_path: Path, archive, behind: bytes) -> None:
    data = archive("a", "b")
    path = rewrite(tmp_path / "x.tar", data + behind)
    index = build_index(path)
    count = len(behind.lstrip(b"\0"))
    assert index.keys == ["a", "b"]
    assert index.rejected == []
    assert (
        index.damage
        == f"broken: {count:,} bytes behind the end of the archive, from byte {path.stat().st_size - count}"
    )


def test_an_archive_that_does_not_begin_at_a_block_is_damage(tmp_path: Path, archive) -> None:
    one, two = archive("a"), archive("b")
    index = build_index(rewrite(tmp_path / "x.tar", one + b"\n" + two))
    assert index.keys == ["a"]
    assert index.damage.startswith("broken: 10,241 bytes behind the end of the archive")


def test_the_last_sample_before_an_end_marker_is_whole(tmp_path: Path, pack, sample) -> None:
    """It may have fewer members than the one before it: nothing of it can be cut off."""
    data = pack(tmp_path / "x.tar", [*sample("a"), *sample("b")[:1]]).read_bytes()
    assert build_index(rewrite(tmp_path / "x.tar", data + b"x")).keys == ["a", "b"]
    assert build_index(rewrite(tmp_path / "x.tar", without_end(data) + bytes(512))).keys == ["a"]


def test_keys_that_two_archives_have_are_rejected_as_in_one(tmp_path: Path, archive) -> None:
    index = build_index(rewrite(tmp_path / "x.tar", archive("a", "b") + archive("b", "a", "c")))
    assert index.keys == ["c"]
    assert {key: reason.partition(":")[0] for key, reason in index.rejected} == {
        "a": "interleaved key",
        "b": "duplicate member",
    }


def test_a_name_that_belongs_to_no_member_is_damage(tmp_path: Path, archive) -> None:
    header = archive(LONG, form=tarfile.PAX_FORMAT)[:1024]
    index = build_index(rewrite(tmp_path / "x.tar", without_end(archive("a", "b")) + header + bytes(1024)))
    assert index.keys == ["a", "b"]
    assert index.damage.startswith("broken: extended header without a member")


def test_gnu_s_volume_label_and_sparse_files_are_passed(tmp_path: Path, archive) -> None:
    def header(name: str, kind: bytes, size: int, *marks: tuple[int, bytes]) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for at, mark in marks:
            block[at : at + len(mark)] = mark
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return bytes(block)

    label = header("backup.2024", b"V", 0)
    sparse = header("s.png", b"S", 512, (482, b"\1")) + bytes(504) + b"\1" + bytes(7) + bytes(512) + b"x" * 512
    index = build_index(rewrite(tmp_path / "x.tar", label + sparse + archive("a", "b")))
    assert (index.keys, index.damage, index.num_strays) == (["a", "b"], "", 0)
    assert index.rejected == [("s", "forbidden member: s.png is a special member")]


def test_a_long_padding_is_cheap(tmp_path: Path, archive) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(archive("a"))
        file.truncate(2**28)
    before = time.process_time()
    assert build_index(tmp_path / "x.tar").damage == ""
    assert time.process_time() - before < 2  # byte by byte it is 20 s


# ---- compressed


def _zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.tar", data)
    return stream.getvalue()


COMPRESSED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zip": _zip,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data,
    "lz4": lambda data: b"\x04\x22\x4d\x18" + data,
    "7z": lambda data: b"7z\xbc\xaf\x27\x1c" + data,
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_tar_is_named_and_refused(tmp_path: Path, archive, name: str) -> None:
    data = archive("a", "b")
    for folder, whole in (("long", data), ("short", data[:200])):  # less than a block when it is compressed
        (tmp_path / folder).mkdir()
        path = rewrite(tmp_path / folder / "x.tar", COMPRESSED[name](whole))
        with pytest.raises(UserError, match=rf"x\.tar: not a tar but compressed (with|as) {name}: unpack it"):
            index_shards(path)
        assert not path.with_name(f"x{SUFFIX}").exists()
        path.write_bytes(data)  # unpacked in its place
        assert len(index_shards(path)[0]) == 2


def test_a_git_lfs_pointer_is_named_and_refused(tmp_path: Path) -> None:
    rewrite(tmp_path / "x.tar", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS pointer: fetch the file itself"):
        index_shards(tmp_path)


def test_a_tar_whose_first_name_begins_like_another_format_is_a_tar(tmp_path: Path, archive) -> None:
    assert build_index(rewrite(tmp_path / "x.tar", archive("BZh1", "b"))).keys == ["BZh1", "b"]


def test_all_compressed_shards_are_named_at_once_and_the_others_indexed(tmp_path: Path, archive) -> None:
    data = archive("a")
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(gzip.compress(data) if number % 2 else data)
    with pytest.raises(UserError, match=r"1\.tar: not a tar .*; .*3\.tar: not a tar"):
        index_shards(tmp_path)
    assert sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}")) == [f"0{SUFFIX}", f"2{SUFFIX}"]
    assert [(Path(p.shard).name, p.reason.partition(" but ")[0]) for p in lint(tmp_path) if not p.key] == [
        ("1.tar", "damaged archive: not a tar"),
        ("3.tar", "damaged archive: not a tar"),
    ]


@pytest.mark.parametrize(
    "name", ["b.tar.gz", "b.tgz", "b.tar.zst", "b.tar.xz", "b.TAR.BZ2", "b.zip", "b.7z", "b.tar.lz4"]
)
def test_a_compressed_archive_beside_shards_is_named(tmp_path: Path, archive, name: str, capsys) -> None:
    rewrite(tmp_path / "one.tar", archive("a"))
    (tmp_path / name).write_bytes(b"?")
    (tmp_path / f"{name}.md5").write_bytes(b"?")
    assert len(index_shards(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told.count(f"1 compressed archive is not read ({name}): unpack to plain .tar files") == 1
    assert [str(problem) for problem in lint(tmp_path)] == [
        f"{tmp_path}/{name}: compressed archive: it is not read; unpack it to a plain .tar"
    ]
    (tmp_path / "one.tar").unlink()
    for source in (tmp_path, tmp_path / name, f"{tmp_path}/b*[!5]"):
        with pytest.raises(UserError, match=rf"no plain \.tar, but 1 compressed archive is not read \({name}\)"):
            find(source)


def test_compressed_archives_in_a_store(store, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz", "c.txt", "c.tar.md5"):
        store.put(f"/x/{name}", 100)
    store.put("/y/b.tar.gz", 100)
    assert find(f"{store.root}/x") == ([f"{store.root}/x/a.tar"], [f"{store.root}/x/b.tar.gz"])
    for source in ("/y", "/y/b.tar.gz", "/y/*.gz"):
        with pytest.raises(UserError, match=r"no plain \.tar, but 1 compressed archive is not read \(b\.tar\.gz\)"):
            find(store.root + source)


def test_training_and_pre_encoding_name_compressed_shards(tmp_path: Path, archive, mmdit, stage) -> None:
    (tmp_path / "shards").mkdir()
    rewrite(tmp_path / "shards" / "x.tar", gzip.compress(archive(*"abcdefgh")))
    options = (f"run.dir={tmp_path}/run", f"data.source={tmp_path}/shards")
    commands = [
        ("train", stage.folder / "autoencoder.yaml", *options),
        ("preencode", stage.folder / "preencode.yaml", f"source={tmp_path}/shards", f"out={tmp_path}/out"),
        *(("data", name, tmp_path / "shards") for name in ("index", "info")),
    ]
    for command in commands:
        done = mmdit(*command)
        assert done.returncode == 2
        assert "x.tar: not a tar but compressed with gzip: unpack it" in done.stderr
        assert "Traceback" not in done.stderr
