"""Captions as people have them: pre-encoded, or left out for a reason that tells what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load

from stack.data.schema import load_manifest
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.text.encoders import write_clip_tokenizer


@pytest.fixture
def preencode(mmdit, stage, tmp_path):
    """`mmdit preencode` of tmp_path/source into tmp_path/NAME."""

    def run(name: str = "out", **values):
        known = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
        changed = {"source": str(tmp_path / "source"), "out": str(tmp_path / name), "max_rejected": 1, **values}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**known, **changed}))
        return mmdit("preencode", tmp_path / f"{name}.yaml")

    return run


def stored(folder: Path) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    shards = ShardSet(index_shards(folder))
    reader = ShardReader(shards.indices)
    places = [shards.locate(number) for number in range(len(shards))]
    return {
        shards.index(shard).key(row): (
            json.loads(reader.read(shard, row, "json")),
            load(reader.read(shard, row, "safetensors")),
        )
        for shard, row in places
    }


ALIKE = {
    "plain": b"it's a caf\xc3\xa9 & a star",
    "quote": "it’s a café & a star".encode(),
    "mark": "\ufeffit's a café & a star\r\n".encode(),
    "entity": b"it&rsquo;s a caf&eacute; &amp;amp; a star",
    "nfd": "it's a cafe\u0301 & a star".encode(),
    "wide": "it's a café & a ｓｔａｒ".encode(),
    "nul": b"it's a caf\xc3\xa9 &\0 a star\x1b[0m",
    "utf16": "it's a café & a star".encode("utf-16"),
}


def test_captions_that_read_alike_are_encoded_alike(preencode, stage, tmp_path, pack, picture, listed):
    """With a tokenizer.json of transformers beside one CLIP, and open_clip's BPE for the other."""
    empty = {
        "only_mark": b"\xef\xbb\xbf",
        "zero_width": "\u200b\u200d".encode(),
        "control": b"\0\x07",
        "nbsp": b"&nbsp;",
    }
    members = [
        member
        for key, text in {**ALIKE, **empty}.items()
        for member in ((f"{key}.png", picture(3)), (f"{key}.txt", text), (f"{key}.json", _json(text)))
    ]
    pack(tmp_path / "source" / "a.tar", members)
    shutil.copytree(stage.encoders / "clip_l", tmp_path / "clip_l")
    write_clip_tokenizer(tmp_path / "clip_l", 49407)
    text = {key: str(stage.encoders / key) for key in ("t5", "clip_g")} | {"clip_l": str(tmp_path / "clip_l")}
    for name, place in (("txt", "txt"), ("json", "json.caption")):
        done = preencode(name, text=text, captions={"c": place})
        assert done.returncode == 0, done.stderr
        found = stored(tmp_path / name)
        expected = found["plain"][1]
        for key in ALIKE:
            for tensor in ("t5", "clip_l", "clip_g", "pooled"):
                assert torch.equal(found[key][1][tensor], expected[tensor]), (name, key, tensor)
        for key in ("plain", "mark", "utf16", "nul"):
            assert found[key][0]["caption"] == "it's a café & a star"
        assert found["quote"][0]["caption"] == "it’s a café & a star"
        reasons = listed(tmp_path / name / "rejected.jsonl")
        assert {key: reason for key, reason in reasons.items() if key in empty} == dict.fromkeys(empty, "empty caption")


def _json(text: bytes) -> bytes:
    decoded = text.decode("utf-16" if text.startswith(b"\xff\xfe") else "utf-8")
    return json.dumps({"caption": decoded}).encode()


def test_a_caption_that_is_no_text_is_told_as_what_it_is(preencode, tmp_path, pack, picture, listed):
    values = {
        "list": ["one", "two"],
        "number": 3,
        "float": 0.5,
        "bool": False,
        "null": None,
        "object": {"en": "a star"},
    }
    values |= {"half": "a \ud800 star", "empty": "\u200b", "good": "a star"}
    members = [(f"{key}.json", json.dumps({"c": value, "d": value}).encode()) for key, value in values.items()]
    members += [("absent.json", b'{"d": "a star"}'), ("whole.json", b'["a star"]')]
    keys = [*values, "absent", "whole"]
    pack(tmp_path / "source" / "a.tar", sorted([*members, *((f"{key}.png", picture()) for key in keys)]))
    assert preencode(captions={"c": "json.c"}).returncode == 0
    assert list(stored(tmp_path / "out")) == ["good"]
    assert listed(tmp_path / "out" / "rejected.jsonl") == {
        "list": "no caption: json.c is a list, expected text",
        "number": "no caption: json.c is a number, expected text",
        "float": "no caption: json.c is a number, expected text",
        "bool": "no caption: json.c is true or false, expected text",
        "null": "no caption: json.c is null, expected text",
        "object": "no caption: json.c is an object, expected text",
        "half": "caption not UTF-8: U+D800 is half of a surrogate pair",
        "empty": "empty caption",
        "absent": "no caption: json.c is missing",
        "whole": "no caption: KEY.json is a list, expected an object with 'c'",
    }
    done = preencode("strict", captions={"c": "json.c"}, max_rejected=0.5)
    assert done.returncode == 2
    assert "8 × no caption, 1 × " in done.stderr


def test_a_second_caption_may_be_absent_but_not_of_another_kind(preencode, tmp_path, pack, picture, listed):
    texts = {"both": "a star", "null": None, "empty": " ", "zero_width": "\u200b", "list": ["a star"]}
    members = []
    for key, value in texts.items():
        members += [
            (f"{key}.png", picture()),
            (f"{key}.txt", b"first"),
            (f"{key}.json", json.dumps({"d": value}).encode()),
        ]
    pack(tmp_path / "source" / "a.tar", [*members, ("bare.png", picture()), ("bare.txt", b"first")])
    assert preencode(captions={"c": "txt", "d": "json.d"}).returncode == 0
    found = {key: "pooled.1" in tensors for key, (_, tensors) in stored(tmp_path / "out").items()}
    assert found == {"both": True, "null": False, "empty": False, "zero_width": False, "bare": False}
    assert listed(tmp_path / "out" / "rejected.jsonl") == {"list": "no caption: json.d is a list, expected text"}


def test_captions_that_were_cut_are_counted_and_the_longest_is_named(mmdit, preencode, tmp_path, pack, picture):
    for shard, words in {"a": [1, 80, 90, 75], "b": [200, 10, 76, 75]}.items():
        members = []
        for number, count in enumerate(words):
            members += [(f"{shard}{number}.png", picture()), (f"{shard}{number}.txt", b"star " * count)]
        pack(tmp_path / "source" / f"{shard}.tar", members)
    done = preencode()
    assert done.returncode == 0, done.stderr
    line = "4 captions were cut: clip_l and clip_g read 77 tokens; the longest has 202: b.tar: b0"
    assert line in done.stderr
    assert preencode().stderr.count(line) == 1  # a set that is finished tells it, too
    assert line in mmdit("data", "info", tmp_path / "out").stdout
    facts = json.loads(mmdit("data", "info", tmp_path / "out", "--json").stdout)
    assert facts["manifest"]["cut"]["clip_l"] == {"captions": 4, "limit": 77, "tokens": 202, "longest": "b.tar: b0"}
    one = json.loads((tmp_path / "out" / "a_stats.json").read_text())["cut"]["clip_g"]
    assert one == {"captions": 2, "limit": 77, "tokens": 92, "longest": "a2"}
    done = preencode("long", text={**yaml.safe_load((tmp_path / "out.yaml").read_text())["text"], "t5_max_tokens": 500})
    assert "t5" not in load_manifest(tmp_path / "long").cut


def test_a_finished_set_of_an_older_version_is_kept_and_an_unfinished_one_is_not_continued(
    preencode, stage, tmp_path, pack, sample, monkeypatch
):
    for shard in "ab":
        pack(tmp_path / "source" / f"{shard}.tar", [m for n in range(3) for m in sample(f"{shard}{n}", n)])
    monkeypatch.setattr("stack.preencode.job.READING", 1)  # the marks of the version before
    assert preencode().returncode == 0
    monkeypatch.undo()
    manifest = tmp_path / "out" / "manifest.json"
    values = json.loads(manifest.read_text())
    assert values.pop("reading") == 1
    assert values.pop("cut") == {}
    manifest.write_text(json.dumps(values))  # as that version wrote it
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert preencode().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    manifest.unlink()
    (tmp_path / "out" / "b_stats.json").unlink()
    done = preencode()
    assert done.returncode == 2
    assert "this shard was made from other" in done.stderr
    shutil.rmtree(tmp_path / "out")
    assert preencode().returncode == 0
    assert load_manifest(tmp_path / "out").reading == 2


def test_lint_finds_the_captions_that_are_left_out(mmdit, tmp_path, pack, picture):
    texts = {
        "zero_width": "\u200b".encode(),
        "latin": b"caf\xe9",
        "mark": b"\xef\xbb\xbf",
        "good": "\ufeffit’s".encode(),
    }
    pack(
        tmp_path / "a.tar",
        [m for key, text in texts.items() for m in ((f"{key}.png", picture()), (f"{key}.txt", text))],
    )
    found = mmdit("data", "lint", tmp_path / "a.tar").stdout
    assert found.count("empty caption") == 2
    assert "latin: caption not UTF-8" in found
    assert "good" not in found
