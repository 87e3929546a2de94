"""Which members decide about a sample: those that somebody reads. Which files are samples at all."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from stack.data.buckets import BucketConfig
from stack.data.index import ShardIndex, build_index
from stack.data.lint import lint
from stack.data.preview import raw_cards
from stack.data.remote import CacheConfig, ShardCache
from stack.data.shards import ShardSet, index_shards

BAD = {
    "empty": b"",
    "blank": b" \r\n\t",
    "latin": "grün".encode("latin-1"),
    "mark": b"\xfea cat",
    "long": b"word " * 20_000,
    "binary": bytes(range(256)),
}
KINDS = {"empty": "empty caption", "blank": "empty caption", "long": "caption too large"}


def kind(name: str) -> str:
    return KINDS.get(name, "caption not UTF-8")


@pytest.fixture
def mixed(tmp_path: Path, pack, sample) -> Path:
    """Twelve sound samples, and one with each bad .txt, whose JSON has a caption."""
    members = [member for number in range(12) for member in sample(f"good{number:02}", number)]
    for name, text in BAD.items():
        members += {**dict(sample(name, 1)), f"{name}.txt": text}.items()
    return pack(tmp_path / "shards" / "x.tar", members)


@pytest.fixture
def preencode(stage, tmp_path: Path, mmdit) -> Callable:
    def run(source: Path, **keys: object):
        values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
        own = {"source": str(source.parent), "out": str(tmp_path / "out"), **keys}
        (tmp_path / "preencode.yaml").write_text(yaml.safe_dump({**values, **own}, sort_keys=False))
        return mmdit("preencode", tmp_path / "preencode.yaml")

    return run


# ---- text that somebody reads


def test_an_index_keeps_samples_whose_text_is_bad(mixed: Path, tmp_path: Path) -> None:
    index = build_index(mixed)
    assert (len(index), index.rejected) == (18, [])
    index.save(tmp_path / "x.index")
    for one in (index, ShardIndex("x.tar", tmp_path / "x.index")):
        found = {one.key(row): reason.partition(":")[0] for row, reason in one.bad_captions.items()}
        assert found == {name: kind(name) for name in BAD}
        assert [one.caption_length[row, 0] for row in one.bad_captions] == [-1] * len(BAD)


def test_an_index_of_sound_shards_is_as_before(tmp_path: Path, pack, sample) -> None:
    """The digest is part of the identity of data that were encoded with an earlier version."""
    members = [member for number in range(4) for member in sample(f"{number}", number)]
    path = pack(tmp_path / "x.tar", [*members, ("last.png", b"broken"), ("last.txt", b"x")])
    expected = hashlib.sha256()
    with tarfile.open(path) as tar:
        for number in range(4):
            spans = [(kind, tar.getmember(f"{number}.{kind}")) for kind in ("json", "png", "txt")]
            listed = [[kind, member.offset_data, member.size] for kind, member in spans]
            expected.update(json.dumps([f"{number}", listed]).encode() + f"a picture of number {number}".encode())
    index = build_index(path)
    assert index.digest == expected.hexdigest()
    assert index.caption_length.tolist() == [[21]] * 4


def test_training_on_images_reads_no_text(mixed: Path, mmdit, stage, tmp_path: Path) -> None:
    options = (f"run.dir={tmp_path}/run", f"data.source={mixed.parent}", "data.max_rejected=0", "schedule.steps=4")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options, "data.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "rejected.jsonl").exists()


def test_who_reads_the_text_counts_it_before_the_work(mixed: Path, preencode, tmp_path: Path, listed) -> None:
    done = preencode(mixed, captions={"txt": "txt"}, max_rejected=0.3)
    assert done.returncode == 2
    assert "6 of 18 samples are broken (" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.jsonl"]
    before = listed(tmp_path / "out" / "rejected.jsonl")
    assert {key: reason.partition(":")[0] for key, reason in before.items()} == {name: kind(name) for name in BAD}
    done = preencode(mixed, captions={"txt": "txt"}, max_rejected=0.4)
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path / "out" / "rejected.jsonl") == before  # what was foreseen is what was met


def test_who_reads_json_is_not_concerned(mixed: Path, preencode, tmp_path: Path) -> None:
    done = preencode(mixed, captions={"long": "json.caption"}, max_rejected=0)
    assert (done.returncode, "18 samples, 0 left out" in done.stdout) == (0, True), done.stderr


def test_a_further_caption_may_be_empty_but_not_broken(mixed: Path, preencode, tmp_path: Path, listed) -> None:
    captions = {"long": "json.caption", "alt": "txt"}
    done = preencode(mixed, captions=captions, max_rejected=0.2)
    assert (done.returncode, "4 of 18 samples are broken (" in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.jsonl"]  # known before the work
    done = preencode(mixed, captions=captions, max_rejected=0.5)
    assert (done.returncode, "14 samples, 4 left out" in done.stdout) == (0, True), done.stderr
    assert set(listed(tmp_path / "out" / "rejected.jsonl")) == {"latin", "mark", "long", "binary"}


def test_broken_json_matters_to_those_who_read_it(tmp_path: Path, pack, sample, preencode, mmdit, stage) -> None:
    members = [member for number in range(6) for member in sample(f"good{number}", number)]
    for number, text in enumerate((b"", b"{", b"[]", b"\xff", b"{" * 10**5, b" " * 2**21)):
        members += {**dict(sample(f"bad{number}", 1)), f"bad{number}.json": text}.items()
    path = pack(tmp_path / "shards" / "x.tar", members)
    assert (len(build_index(path)), build_index(path).rejected) == (12, [])
    done = preencode(path, captions={"txt": "txt"}, max_rejected=0)
    assert (done.returncode, "12 samples, 0 left out" in done.stdout) == (0, True), done.stderr
    options = (f"run.dir={tmp_path}/run", f"data.source={path.parent}", "data.max_rejected=0", "schedule.steps=3")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options, "data.batch_size=4")
    assert done.returncode == 0, done.stderr


def test_commands_name_bad_captions(mixed: Path, mmdit) -> None:
    done = mmdit("data", "index", mixed)
    assert "18 samples, 0 left out" in done.stdout
    assert "\n  blank: empty caption (its image is used)" in done.stdout
    assert "caption not usable: 2 × empty caption" in mmdit("data", "info", mixed).stdout
    found = {(p.key, p.reason.partition(":")[0]) for p in lint(mixed)}
    assert found == {(name, kind(name)) for name in BAD}


def test_a_preview_shows_the_image_beside_the_reason(mixed: Path, tmp_path: Path) -> None:
    shards = ShardSet(index_shards(mixed))
    cache, rule = ShardCache(CacheConfig(dir=tmp_path / "cache")), BucketConfig(resolution=32).rule()
    for card in raw_cards(shards, cache, rule, range(18)):
        assert len(card.pictures) == 2
        assert card.problem.partition(":")[0] == (kind(card.key) if card.key in BAD else "")
        assert bool(card.captions) == (card.key not in BAD)


def test_a_huge_text_is_not_read(tmp_path: Path, pack, sample) -> None:
    """A caption file of 5 GB. An index cannot store its size."""
    path = pack(tmp_path / "x.tar", [*sample("a"), *sample("b")[:1]])
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    info = tarfile.TarInfo("b.txt")
    info.size = 5 * 2**30
    with path.open("wb") as file:
        file.write(data + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(len(data) + 512 + info.size + 1024)
    index = build_index(path)
    assert (index.keys, index.rejected, index.damage) == (["a", "b"], [], "")
    assert index.bad_captions[1].startswith("caption too large")
    assert not index.has(1, "txt")


def test_members_beside_the_image_may_be_doubled_or_links(tmp_path: Path, pack, sample) -> None:
    path = pack(tmp_path / "x.tar", [*sample("a"), ("a.npy", b"1"), ("a.npy", b"2"), *sample("b"), ("b.txt", b"two")])
    with tarfile.open(path, "a") as tar:
        for key, kinds in (("c", ("png", "json")), ("d", ("png", "txt"))):
            for kind, data in ((name.partition(".")[2], data) for name, data in sample(key)):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data) if kind in kinds else 0
                info.type, info.linkname = (tarfile.REGTYPE, "") if kind in kinds else (tarfile.SYMTYPE, "/etc/passwd")
                tar.addfile(info, io.BytesIO(data))
    index = build_index(path)
    assert (index.keys, index.rejected) == (["a", "b", "c", "d"], [])
    assert index.bad_captions == {
        1: "caption not a file: b.txt is a duplicate",
        2: "caption not a file: c.txt is a symbolic link",
    }
    assert [index.has(row, "txt") for row in range(4)] == [True, False, False, True]
    assert [index.has(row, "json") for row in range(4)] == [True, True, True, False]


# ---- files of no sample

DOCUMENTS = ["README.md", "LICENSE.txt", "metadata.json", "Thumbs.db", ".DS_Store", "__MACOSX/._0001.png"]
DOCUMENTS += ["dataset_info.yaml", "index.html", "README", "LICENSE", "classes.txt", "prompts.txt", "CITATION.cff"]
NAMED = ["license.txt", "LICENCE.TXT", "Readme.md", "labels.json", "metadata.json", "dataset_infos.json"]


@pytest.mark.parametrize("where", ["first", "last", "between"])
def test_files_about_the_shard_are_no_samples(tmp_path: Path, pack, sample, where: str) -> None:
    members = [member for number in range(4) for member in sample(f"{number:04}", number)]
    at = {"first": 0, "last": len(members), "between": 4}[where]  # between the members of a sample
    files = [(name, b"{}") for name in DOCUMENTS]
    index = build_index(pack(tmp_path / "x.tar", members[:at] + files + members[at:]))
    assert (index.keys, index.rejected) == ([f"{number:04}" for number in range(4)], [])
    assert (index.num_strays, index.strays) == (len(DOCUMENTS), DOCUMENTS[:10])
    [note] = index.passed_over
    assert note.startswith(f"not read: files of no sample: {len(DOCUMENTS)} (README.md, LICENSE.txt, metadata.json, ")


def test_they_are_known_by_their_names_where_keys_have_no_digits(tmp_path: Path, pack, sample) -> None:
    members = [member for key in ("a red fox", "two cats") for member in sample(key)]
    files = [(name, b"{}") for name in NAMED]
    index = build_index(pack(tmp_path / "x.tar", members + files + [("three dogs.txt", b"its image is lost")]))
    assert index.keys == ["a red fox", "two cats"]
    assert [key for key, _ in index.rejected] == ["three dogs"]
    assert index.strays == NAMED


@pytest.mark.parametrize("left", [("txt",), ("json",), ("txt", "json"), ("cls",), ("seg.png", "txt"), ("gif", "txt")])
def test_a_sample_that_lost_its_image_is_broken(tmp_path: Path, pack, sample, left: tuple[str, ...]) -> None:
    members = [(name, data) for number in range(4) for name, data in [*sample(f"{number}"), (f"{number}.cls", b"1")]]
    index = build_index(pack(tmp_path / "x.tar", [*members, *((f"9.{extension}", b"{}") for extension in left)]))
    assert index.keys == ["0", "1", "2", "3"]
    assert index.strays == []
    [(key, reason)] = index.rejected
    assert (key, reason.partition(":")[0]) == ("9", "no image")


@pytest.mark.parametrize("extensions", [("txt",), ("json",), ("gif",), ("avif", "txt"), ("mp4", "json"), ("npy",)])
def test_shards_without_an_image_are_not_passed_over(tmp_path: Path, pack, extensions: tuple[str, ...]) -> None:
    keys = ["0001", "0002", "a cat"]
    members = [(f"{key}.{extension}", b"{}") for key in keys for extension in extensions]
    index = build_index(pack(tmp_path / "x.tar", [("README.md", b""), *members]))
    assert [key for key, _ in index.rejected] == keys
    assert index.strays == ["README.md"]


def test_failed_downloads_stop_pre_encoding(tmp_path: Path, pack, sample, preencode) -> None:
    """As img2dataset leaves them: KEY.json alone."""
    members = [member for number in range(12) for member in sample(f"{number:05}", number)]
    members += [(f"{number:05}.json", b'{"status": "failed_to_download"}') for number in range(12, 18)]
    done = preencode(pack(tmp_path / "shards" / "x.tar", members), captions={"txt": "txt"}, max_rejected=0.3)
    assert (done.returncode, "6 of 18 samples are broken (6 × no image)" in done.stderr) == (2, True), done.stderr


def test_a_pickle_is_refused_wherever_it_is(tmp_path: Path, pack, sample) -> None:
    index = build_index(pack(tmp_path / "x.tar", [*sample("1"), ("model.pkl", b"x"), ("../README.md", b"x")]))
    assert dict(index.rejected) == {
        "model": "forbidden member: .pkl can run code",
        "../README": "path outside the archive",
    }


# ---- further images


def test_further_images_of_a_sample_are_named(tmp_path: Path, pack, sample, picture, mmdit) -> None:
    members = [member for number in range(3) for member in sample(f"{number}", number)]
    members += [("3.png", picture(3)), ("3.jpg", picture(3, "JPEG")), ("3.txt", b"both")]
    members += [("4.png", picture(4)), ("4.1.png", b"not read"), ("4.seg.png", b""), ("4.gif", b""), ("4.txt", b"four")]
    path = pack(tmp_path / "shards" / "x.tar", members)
    index = build_index(path)
    assert (len(index), index.image_extension(3), index.image_extension(4)) == (5, "jpg", "png")
    assert index.further_images == [
        ("jpg", "png", 1),
        ("png", "1.png", 1),
        ("png", "gif", 1),
        ("png", "seg.png", 1),
    ]
    for command in ("index", "info", "lint"):
        done = mmdit("data", command, path)
        assert done.returncode == 0, done.stdout + done.stderr  # they may be masks, or whatever they like
        for line in ("not read: 1 × .png beside .jpg", "not read: 1 × .1.png beside .png", "1 × .seg.png beside .png"):
            assert line in done.stdout
    assert "no problem in 5 samples" in done.stdout


def test_info_counts_over_shards(tmp_path: Path, pack, sample, mmdit) -> None:
    for number in range(3):
        members = [*sample(f"{number}"), (f"{number}.seg.png", b""), ("README.md", b""), ("LICENSE", b"")]
        pack(tmp_path / "shards" / f"{number}.tar", members)
    done = mmdit("data", "info", tmp_path / "shards", "--json")
    facts = json.loads(done.stdout)
    assert (facts["strays"], facts["further_images"]) == (6, [["png", "seg.png", 3]])
    assert "not read: files of no sample: 6\n" in mmdit("data", "info", tmp_path / "shards").stdout


def test_memory_of_an_index_is_bounded_whatever_is_not_read(tmp_path: Path, pack, sample) -> None:
    members = [*sample("1"), *((f"1.{number}.png", b"") for number in range(2000))]
    members += [(f"{'x' * 900}{number}/README", b"") for number in range(2000)]
    index = build_index(pack(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    index.save(tmp_path / "x.index")
    assert (index.num_strays, len(index.strays), len(index.further_images)) == (2000, 10, 10)
    assert (tmp_path / "x.index").stat().st_size < 2**14
    assert np.array_equal(ShardIndex("x", tmp_path / "x.index").width, index.width)
