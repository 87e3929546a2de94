from __future__ import annotations

import io
import json
import os
import pickle
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from stack.config import UserError
from stack.data.index import SUFFIX, ShardIndex, build_index
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.data.sources import find_shards

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def _png(width: int = 8, height: int = 8, colour: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _sample(key: str, number: int) -> list[tuple[str, bytes]]:
    """A sample whose image, caption and JSON all tell its number."""
    return [
        (f"{key}.png", _png(8 + number, 10 + 2 * number, number)),
        (f"{key}.txt", f"picture number {number:04}".encode()),
        (f"{key}.json", json.dumps({"number": number}).encode()),
    ]


def _samples(count: int) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in _sample(f"{number:05}", number)]


def _contents(index: ShardIndex) -> dict[str, dict[str, bytes]]:
    """What a reader gets: key → extension → bytes."""
    reader = ShardReader([index])
    return {
        key: {ext: reader.read(0, row, ext) for ext in index.extensions if index.has(row, ext)}
        for row, key in enumerate(index.keys)
    }


def _truth(path: Path) -> dict[str, dict[str, bytes]]:
    """The same by Python's tarfile, for a whole shard of plain names."""
    truth: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            stream = tar.extractfile(member)
            assert stream is not None
            truth.setdefault(key, {})[extension] = stream.read()
    return truth


def test_a_whole_shard(tmp_path: Path) -> None:
    index = build_index(_write(tmp_path / "a.tar", _samples(5)))
    assert index.keys == [f"{number:05}" for number in range(5)]
    assert index.width.tolist() == [8, 9, 10, 11, 12]
    assert index.height.tolist() == [10, 12, 14, 16, 18]
    assert index.caption_length.tolist() == [[19]] * 5
    assert (index.damage, index.rejected) == ("", [])
    assert index.width.dtype == np.int32
    assert index.sizes == {(8 + number, 10 + 2 * number): 1 for number in range(5)}
    assert _contents(index) == _truth(tmp_path / "a.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_gives_a_subset_rightly_paired(tmp_path: Path, form: int) -> None:
    long = "folder/" + "x" * 150 if form != tarfile.USTAR_FORMAT else "folder"
    members = [member for number in range(3) for member in _sample(f"{long}/ä{number}", number)]
    whole = _write(tmp_path / "whole.tar", members, form)
    truth, data = _truth(whole), whole.read_bytes()
    assert _contents(build_index(whole)) == truth
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    found = []
    for cut in range(0, end + 1024, 512):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        index = build_index(path)
        assert index.damage.startswith("truncated at byte")
        contents = _contents(index)
        assert contents.items() <= truth.items()
        found.append(len(contents))
    assert found == sorted(found)
    assert sorted(set(found)) == [0, 1, 2, 3]
    assert found[-2:] == [3, 3]  # only the end is missing
    assert build_index(_rewrite(path, data[: end + 1024])).damage == ""


def _rewrite(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_cut_sample_is_rejected_with_the_reason(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a.tar", _samples(3))
    with tarfile.open(whole) as tar:
        at = tar.getmember("00002.txt").offset
    index = build_index(_rewrite(tmp_path / "cut.tar", whole.read_bytes()[:at]))
    assert index.keys == ["00000", "00001"]
    assert index.rejected == [("00002", f"incomplete: shard truncated at byte {at}")]


def test_an_overwritten_header_is_damage(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a.tar", _samples(4))
    with tarfile.open(whole) as tar:
        at = tar.getmember("00002.txt").offset
    for patch in (b"\xff" * 512, b"\0" * 512):
        data = whole.read_bytes()
        index = build_index(_rewrite(tmp_path / "b.tar", data[:at] + patch + data[at + 512 :]))
        assert f"byte {at}" in index.damage
        assert index.damage.startswith("broken")
        assert index.keys == ["00000", "00001"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_raises_or_pairs_wrongly(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(_write(folder / "a.tar", _samples(2), tarfile.PAX_FORMAT).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    index = build_index(_rewrite(folder / "b.tar", bytes(content)))
    for members in _contents(index).values():
        for number in (0, 1):
            if members["txt"] == f"picture number {number:04}".encode():
                assert Image.open(io.BytesIO(members["png"])).size == (8 + number, 10 + 2 * number)


@pytest.mark.parametrize("data", [b"", b"x", b"not a tar" * 500, b"\x1f\x8b" + b"\0" * 2000])
def test_no_tar_at_all_is_damage(tmp_path: Path, data: bytes) -> None:
    index = build_index(_rewrite(tmp_path / "a.tar", data))
    assert len(index) == 0
    assert index.damage


def test_numbers_of_any_size_are_refused_without_reading(tmp_path: Path) -> None:
    """A header may promise 2**60 bytes, or a pax record a size of many digits."""
    data = bytearray(_write(tmp_path / "a.tar", _samples(1)).read_bytes())
    data[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    assert build_index(_rewrite(tmp_path / "b.tar", bytes(data))).damage.startswith("truncated")
    for size in ("9" * 5000, "-5", "x"):
        with tarfile.open(tmp_path / "c.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("a.txt")
            info.pax_headers = {"size": size}
            tar.addfile(info)
        assert build_index(tmp_path / "c.tar").damage


def test_interleaved_and_repeated_keys_are_rejected(tmp_path: Path) -> None:
    a, b, c, d = (_sample(key, number) for number, key in enumerate("abcd"))
    index = build_index(_write(tmp_path / "x.tar", [a[0], b[0], a[1], b[1], *c, *d, d[0], *_sample("e", 4), *c]))
    assert index.keys == ["e"]
    reasons = dict(index.rejected)
    assert reasons["a"].startswith("interleaved key")
    assert reasons["b"].startswith("interleaved key")
    assert reasons["c"].startswith("interleaved key")
    assert reasons["d"] == "duplicate member: d.png"


def test_dots_in_names_never_merge_samples(tmp_path: Path) -> None:
    one, other = _sample("st.basil", 1), _sample("st.peter", 2)
    index = build_index(_write(tmp_path / "x.tar", [*one, *other, *_sample("v1.5/0001", 3)]))
    assert index.keys == ["v1.5/0001"]
    assert dict(index.rejected)["st"].startswith("no image: only .basil.json, .basil.png, .basil.txt, .peter")


def test_further_members_do_not_disturb(tmp_path: Path) -> None:
    members = [("README", b"hi"), ("._a.png", b"mac"), *_sample("./a", 1), ("./a.seg.png", b"?"), ("./a.cls", b"3")]
    index = build_index(_write(tmp_path / "x.tar", members))
    assert index.keys == ["a"]
    assert index.rejected == []


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pth", "pt", "pyd", "PKL", "emb.pth"])
def test_a_member_that_can_run_code_costs_its_sample(tmp_path: Path, extension: str) -> None:
    members = [*_sample("a", 1), (f"a.{extension}", b"x"), *_sample("b", 2)]
    index = build_index(_write(tmp_path / "x.tar", members))
    assert index.keys == ["b"]
    assert [reason.partition(":")[0] for _, reason in index.rejected] == ["forbidden member"]


def test_paths_outside_and_special_members_are_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in ("../../up", "/root", "good"):
            for name, data in _sample(key, 1):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for key, kind in [("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(f"{key}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        folder = tarfile.TarInfo("some.folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = build_index(tmp_path / "x.tar")
    assert index.keys == ["good"]
    assert {key: reason.partition(":")[0] for key, reason in index.rejected} == {
        "../../up": "path outside the archive",
        "/root": "path outside the archive",
        "soft": "forbidden member",
        "hard": "forbidden member",
        "dev": "forbidden member",
    }


def test_bad_samples_are_rejected_one_by_one(tmp_path: Path) -> None:
    members = [
        *_sample("a", 1),
        *[("b.png", _png()[:20]), ("b.txt", b"cut header")],
        *[("c.png", _png()), ("c.json", b"{}")],
        *[("d.png", _png()), ("d.txt", b" \n")],
        *[("e.png", _png()), ("e.txt", b"gr\xfcn")],
        *[("f.txt", b"no picture")],
        *[("g.png", b"GIF89a"), ("g.txt", b"other format")],
        *_sample("h", 2),
    ]
    index = build_index(_write(tmp_path / "x.tar", members))
    assert index.keys == ["a", "c", "d", "e", "h"]
    assert index.caption_length[1:4].tolist() == [[-1]] * 3
    assert index.bad_captions == {2: "empty caption", 3: "caption not UTF-8: invalid start byte"}
    assert {key: reason.partition(":")[0] for key, reason in index.rejected} == {
        "b": "image not readable",
        "f": "no image",
        "g": "image not readable",
    }


def test_captions_are_measured_in_characters(tmp_path: Path) -> None:
    index = build_index(_write(tmp_path / "x.tar", [("a.jpeg", _png()), ("a.txt", " grüße 你好\n".encode())]))
    assert index.caption_length.tolist() == [[8]]
    assert index.image_extension(0) == "jpeg"


def test_samples_may_lack_members(tmp_path: Path) -> None:
    index = build_index(_write(tmp_path / "x.tar", [*_sample("a", 1), *_sample("b", 2)[:2]]))
    assert index.span(0, "json")[1] == 13
    assert [index.has(row, "json") for row in (0, 1)] == [True, False]
    with pytest.raises(KeyError, match="json"):
        ShardReader([index]).read(0, 1, "json")


def test_a_pre_encoded_shard(tmp_path: Path) -> None:
    members = []
    for number in range(3):
        tensors = {
            "latent_mean": torch.zeros(4, 5, 3),
            "latent_logvar": torch.zeros(4, 5, 3),
            "t5": torch.zeros(7 + number, 16),
            "clip_l": torch.zeros(4, 8),
            "pooled": torch.zeros(99),
        }
        members += [(f"{number}.safetensors", save(tensors)), (f"{number}.json", b"{}")]
    members += [("cut.safetensors", save(tensors)[:-4]), ("cut.json", b"{}")]
    members += [("flat.safetensors", save({"latent_mean": torch.zeros(4)}))]
    index = build_index(_write(tmp_path / "x.tar", members))
    assert index.keys == ["0", "1", "2"]
    assert index.width.tolist() == [3] * 3
    assert index.height.tolist() == [5] * 3
    assert index.caption_length.tolist() == [[7], [8], [9]]
    assert [(key, reason.partition(":")[0]) for key, reason in index.rejected] == [
        ("cut", "safetensors not readable"),
        ("flat", "safetensors not readable"),
    ]
    with pytest.raises(KeyError, match="no image"):
        index.image_extension(0)


def test_an_index_comes_back_from_its_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1") as tar:  # names that are not UTF-8
        for name, data in [*_sample("ä", 1), *_sample("b", 2)[:2], *_sample("c", 3)[1:], *_sample("a", 1)[1:]]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = build_index(tmp_path / "x.tar")
    assert index.keys == ["ä", "b"] or index.keys == ["\udce4", "b"]
    path = tmp_path / "folder" / f"x{SUFFIX}"
    index.save(path)
    again = ShardIndex(index.url, path)
    for one in (again, pickle.loads(pickle.dumps(again))):
        for name in ("width", "height", "caption_length", "by_hash"):
            assert np.array_equal(getattr(index, name), getattr(one, name))
        for name in ("url", "size", "version", "rejected", "damage", "digest", "sizes", "extensions", "keys"):
            assert getattr(index, name) == getattr(one, name)
        for row, extension in ((0, "png"), (1, "txt")):
            assert index.span(row, extension) == one.span(row, extension)
        one.release()
        assert one.width.tolist() == index.width.tolist()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    data = path.read_bytes()
    for broken in (b"", data[:7], data[:-1], data + b"x", data[:8] + b"x" * 50, b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a shard index"):
            ShardIndex(index.url, path)


def _three_shards(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate([3, 1, 2]):
        _write(folder / f"{number:05}.tar", _samples(count))
    return folder


def test_sources(tmp_path: Path) -> None:
    folder = _three_shards(tmp_path / "data")
    (folder / "notes.txt").touch()
    names = [str(folder / f"{number:05}.tar") for number in range(3)]
    assert find_shards(folder) == names
    assert find_shards(f"{folder}/*.tar") == names
    assert find_shards(f"{folder}/{{00000..00001}}.tar") == names[:2]
    assert find_shards(f"{folder}/0000{{2,0}}.tar") == [names[0], names[2]]
    assert find_shards(f"{tmp_path}/{{data,data}}") == names
    assert find_shards(names[1]) == [names[1]]


def test_missing_sources_are_user_errors(tmp_path: Path) -> None:
    folder = _three_shards(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for source, words in [
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path / "empty", r"empty: no \*.tar"),
        (f"{folder}/{{00000..00003}}.tar", "00003.tar: no such"),
        (f"{folder}/9*.tar", "no such"),
        ("pipe:cat x.tar", "pipe:"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            index_shards(source, tmp_path / "cache")
        assert "\n" not in str(error.value)


def test_a_changed_shard_is_refused_until_it_is_indexed_again(tmp_path: Path) -> None:
    folder = _three_shards(tmp_path / "data")
    progress: list[tuple[int, int]] = []
    found = index_shards(folder, progress=lambda *state: progress.append(state))
    assert [len(index) for index in found] == [3, 1, 2]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    written = {path: path.stat().st_mtime_ns for path in folder.glob(f"*{SUFFIX}")}
    assert len(written) == 3
    assert [index.url for index in index_shards(folder)] == find_shards(folder)
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob(f"*{SUFFIX}")}
    broken = folder / f"00000{SUFFIX}"
    broken.write_bytes(broken.read_bytes()[:-30])  # no index: built anew without ado
    assert [len(index) for index in index_shards(folder)] == [3, 1, 2]
    _write(folder / "00001.tar", _samples(4))
    with pytest.raises(UserError, match=r"00001.tar: the shard changed since it was indexed .*: mmdit data index"):
        index_shards(folder)
    assert [len(index) for index in index_shards(folder, rebuild=True)] == [3, 4, 2]
    data = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(data[:-2000] + bytes(1) + data[-1999:])  # written again: the same content
    assert [len(index) for index in index_shards(folder)] == [3, 4, 2]
    (folder / "00002.tar").write_bytes(data.replace(b"picture", b"drawing"))  # of the same size
    with pytest.raises(UserError, match=r"00002.tar: the shard changed .*other content of the same size"):
        index_shards(folder)


def test_many_bytes_are_indexed_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "at work").mkdir()

    def build(*arguments: Any) -> ShardIndex:
        """Waits for another process to be at work, too."""
        (tmp_path / "at work" / str(os.getpid())).touch()
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "at work").iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return build_index(*arguments)

    monkeypatch.setattr("stack.data.shards._PARALLEL_BYTES", 0)
    monkeypatch.setattr("stack.data.shards.build_index", build)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    found = index_shards(_three_shards(tmp_path / "data"))
    assert [index.keys for index in found] == [["00000", "00001", "00002"], ["00000"], ["00000", "00001"]]
    assert len(list((tmp_path / "data").glob(f"*{SUFFIX}"))) == 3
    pids = {int(path.name) for path in (tmp_path / "at work").iterdir()}
    assert len(pids - {os.getpid()}) == 2


def test_an_indexing_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _three_shards(tmp_path / "data")
    built: list[str] = []

    def build(path: str) -> ShardIndex:
        built.append(Path(path).stem)
        if built == ["00000", "00001"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return build_index(path)

    monkeypatch.setattr("stack.data.shards.build_index", build)
    if (child := os.fork()) == 0:
        try:
            index_shards(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [finished] = folder.glob(f"*{SUFFIX}")
    written = finished.stat().st_mtime_ns
    built.append("of the next process")
    assert [len(index) for index in index_shards(folder)] == [3, 1, 2]
    assert built[1:] == ["00001", "00002"]
    assert (finished.name, finished.stat().st_mtime_ns) == (f"00000{SUFFIX}", written)


def test_a_cache_keeps_folders_apart_and_the_data_untouched(tmp_path: Path) -> None:
    one, other = _three_shards(tmp_path / "a" / "data"), _three_shards(tmp_path / "b" / "data")
    _write(other / "00000.tar", _samples(7))
    cache = tmp_path / "cache"
    for _ in range(2):
        assert [len(index_shards(folder, cache)[0]) for folder in (one, other)] == [3, 7]
    assert len(list(cache.rglob(f"00000{SUFFIX}"))) == 2
    assert not list(one.glob("*index*"))


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    folder = _three_shards(tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        index_shards(folder, tmp_path / "file")


def test_reader_notices_a_changed_shard(tmp_path: Path) -> None:
    folder = _three_shards(tmp_path / "data")
    indices = index_shards(folder, tmp_path / "cache")
    reader = ShardReader(indices)
    data = reader.read(0, 0, "png")
    (folder / "00000.tar").write_bytes(b"")  # while it is open
    with pytest.raises(UserError, match=r"00000.tar: the shard changed .* 0 now"):
        reader.read(0, 0, "png")
    _write(folder / "00001.tar", _samples(9))
    with pytest.raises(UserError, match=r"00001.tar: the shard changed"):
        reader.read(1, 0, "png")
    (folder / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002.tar"):
        reader.read(2, 0, "png")
    assert data == _png(8, 10, 0)


def test_reader_keeps_few_files_open(tmp_path: Path) -> None:
    reader = ShardReader(index_shards(_three_shards(tmp_path / "data"), tmp_path / "cache"), max_open=2)
    for shard in (0, 1, 2, 0, 1, 2):
        assert reader.read(shard, 0, "txt") == b"picture number 0000"
        assert len(reader._files) <= 2
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(2, 1, "txt") == b"picture number 0001"
    reader.close()
    assert not reader._files


def test_reader_opens_anew_after_a_fork(tmp_path: Path) -> None:
    reader = ShardReader(index_shards(_three_shards(tmp_path / "data"), tmp_path / "cache"))
    reader.read(0, 0, "txt")
    inherited = reader._files[0]
    if (child := os.fork()) == 0:
        right = reader.read(0, 1, "txt") == b"picture number 0001" and reader._files[0] is not inherited
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.read(0, 2, "txt") == b"picture number 0002"
    assert reader._files[0] is inherited


def test_shard_set(tmp_path: Path) -> None:
    samples = ShardSet(index_shards(_three_shards(tmp_path / "data"), tmp_path / "cache"))
    assert len(samples) == samples.num_samples == 6
    assert [samples.locate(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert [samples.key(i) for i in range(6)] == ["00000", "00001", "00002", "00000", "00000", "00001"]
    assert samples.held_out(2, 2**32)[0].tolist() == [1, 5]  # of the samples of key 00001, the lowest of the keys
    assert samples.held_out(9, 2**32)[0].tolist() == list(range(6))
    assert samples.held_out(9, 0)[0].tolist() == []
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            samples.locate(outside)
    assert len(ShardSet([])) == 0


def test_empty_shards_are_stepped_over(tmp_path: Path) -> None:
    for number, count in enumerate([0, 2, 0, 0, 1, 0]):
        _write(tmp_path / f"{number}.tar", _samples(count))
    samples = ShardSet(index_shards(tmp_path))
    assert [samples.locate(i) for i in range(3)] == [(1, 0), (1, 1), (4, 0)]


def test_fingerprint_tells_sources_apart(tmp_path: Path) -> None:
    one, other = _three_shards(tmp_path / "a"), _three_shards(tmp_path / "b")

    def fingerprint(folder: Path) -> str:
        return ShardSet(index_shards(folder, tmp_path / "cache", rebuild=True)).fingerprint()

    same = fingerprint(one)
    assert same == fingerprint(other)  # wherever it lies, whenever it was copied
    members = _samples(2)
    _write(other / "00002.tar", [(name.replace("00001", "00007"), data) for name, data in members])
    assert fingerprint(other) != same
    _write(other / "00002.tar", [*members[:3], members[5], members[3], members[4]])
    assert fingerprint(other) != same
    _write(other / "00002.tar", members)
    assert fingerprint(other) == same
    edited = [(name, data.replace(b"picture", b"drawing")) for name, data in members]
    _write(other / "00002.tar", edited)  # a caption of the same length
    assert fingerprint(other) != same
    _write(other / "00002.tar", members)
    (other / "00002.tar").rename(other / "00003.tar")
    assert fingerprint(other) != same


@pytest.mark.skipif(not (DATA / "emoji").is_dir(), reason="shared data is not here")
@pytest.mark.parametrize(("name", "count"), [("emoji", 3786), ("photos", 384)])
def test_real_shards(name: str, count: int, tmp_path: Path) -> None:
    indices = index_shards(DATA / name, tmp_path)
    assert sum(map(len, indices)) == count
    for index in indices:
        assert (index.damage, index.rejected) == ("", [])
        truth = _truth(Path(index.url))
        assert _contents(index) == truth
        for row, key in enumerate(index.keys):
            members = truth[key]
            assert index.caption_length[row] == [len(members["txt"].decode().strip())]
            size = Image.open(io.BytesIO(members[index.image_extension(row)])).size
            assert size == (index.width[row], index.height[row])
    assert ShardSet(indices).fingerprint() == ShardSet(index_shards(DATA / name, tmp_path)).fingerprint()
