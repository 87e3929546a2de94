"""Any key that names no path outside is indexed, encoded and read again, by other readers of tars too."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from stack.data.dataset import LatentData, LatentDataset
from stack.data.index import build_index
from stack.data.lint import lint
from stack.data.safety import MAX_KEY, RejectLog, refuse_name
from stack.data.schema import EncodedSample
from stack.data.shards import ShardReader
from stack.preencode.writer import ShardWriter
from stack.text.conditioning import EncodedText

CAPTION = "a_photo_of_a_red_fox_in_the_snow_with_trees_behind_it_and_the_sun_going_down_over_the_hills"
KEYS = [
    CAPTION,
    CAPTION + " " + CAPTION,  # more than tar's plain header holds
    "x" * 100,
    "x" * 255,
    "long/" + "y" * (MAX_KEY - 5),
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467",  # joiners
    "no-break\u00a0space\u202f",
    "n\u00e9",
    "ne\u0301",  # the same to the eye
    "Case",
    "case",
    "latin \udce9\udcff",  # bytes that are not UTF-8
    "line\nend",
    "tab\tand\x1b[31mred\x07\r",
    "12:30:00",
    "back\\slash",
    " space before and after ",
    "--delete",
    "$(touch x) `touch y` 'quoted' \"twice\"",
    "\u53f3\u304b\u3089\u202egnp",
    "folder.with.dots/.hidden/key",
    "percent%2Fencoded",
    "=,{}[]#&?*",
]
REFUSED = {
    "../up": "path outside the archive",
    "nul\0inside é": "bad name: it has a NUL",
    "z" * (MAX_KEY + 1): f"bad name: its key has more than {MAX_KEY:,} bytes",
}


@pytest.fixture
def source(tmp_path: Path, pack) -> Path:
    """A sample of each key."""
    stream = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 60)).save(stream, "PNG")
    members = [(f"{key}{end}", data) for key in KEYS for end, data in ((".png", stream.getvalue()), (".txt", b"a fox"))]
    return pack(tmp_path / "shards" / "x.tar", members, tarfile.PAX_FORMAT)


@pytest.fixture
def pack() -> Callable[..., Path]:
    def write(path: Path, members: list[tuple[str, bytes]], form: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


def test_what_is_indexed_is_encoded_and_trained_on(source: Path, tmp_path: Path, mmdit, stage) -> None:
    assert build_index(source).keys == KEYS
    assert list(lint(source)) == []
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    written = []
    for name in ("out", "again"):
        own = {"source": str(source.parent), "out": str(tmp_path / name), "max_rejected": 0}
        (tmp_path / "preencode.yaml").write_text(yaml.safe_dump({**values, **own}))
        done = mmdit("preencode", tmp_path / "preencode.yaml")
        assert done.returncode == 0, done.stderr
        assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
        written.append((tmp_path / name / "x.tar").read_bytes())
    assert written[0] == written[1]
    assert build_index(tmp_path / "out" / "x.tar").keys == KEYS
    assert list(lint(tmp_path / "out")) == []
    data = LatentDataset(LatentData(path=str(tmp_path / "out"), batch_size=1, validation_share=0), seed=0)
    assert sorted(key for batch in data.loader(0, len(KEYS), 0, 1, 1) for key in batch.keys) == sorted(KEYS)
    done = mmdit("preencode", tmp_path / "preencode.yaml", "--verify", str(len(KEYS)))
    assert (done.returncode, "all agree" in done.stdout) == (0, True), done.stdout + done.stderr


def test_other_readers_find_the_same_keys(tmp_path: Path) -> None:
    import webdataset

    writer = ShardWriter(tmp_path / "x.tar", torch.bfloat16)
    text = EncodedText(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    for number, key in enumerate(KEYS):
        mean = torch.full((4, 2, 2), float(number))
        writer.add(key, EncodedSample(mean, torch.zeros(4, 2, 2), [text]), {"caption": f"caption {number}"})
    writer.finish({})
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = tar.getnames()
    assert [name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")] == KEYS
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)}
    assert list(found) == KEYS
    index = build_index(tmp_path / "x.tar")
    reader = ShardReader([index])
    assert index.keys == KEYS
    for row, key in enumerate(KEYS):
        for extension in ("safetensors", "json"):
            assert found[key][extension] == reader.read(0, row, extension)
        assert f'"caption {row}"'.encode() in found[key]["json"]


def test_what_cannot_be_a_key_is_refused_by_the_index(tmp_path: Path, pack, mmdit) -> None:
    members = [(f"{key}{end}", b"") for key in [*REFUSED, "good"] for end in (".png", ".txt")]
    index = build_index(pack(tmp_path / "x.tar", members, tarfile.PAX_FORMAT))
    assert {reason for key, reason in index.rejected if key != "good"} == set(REFUSED.values())
    assert len(index.rejected) == 4
    done = mmdit("data", "lint", tmp_path / "x.tar")
    assert all(reason in done.stdout for reason in REFUSED.values())


def test_the_longest_key_can_be_written_again() -> None:
    longest = "é" * (MAX_KEY // 2)
    assert [refuse_name(f"{longest}.{kind}") for kind in ("png", "safetensors")] == ["", ""]
    assert refuse_name(f"{longest}x.png") == f"bad name: its key has more than {MAX_KEY:,} bytes"


def test_long_keys_that_begin_alike_count_one_by_one(tmp_path: Path) -> None:
    log = RejectLog(tmp_path / "rejected.jsonl")
    assert all(log.add("x.tar", f"{'a' * 500}{number}", "broken") for number in range(10))
    assert log.kinds == {"broken": 10}
    keys = {json.loads(line)["key"] for line in log.path.read_text().splitlines()}
    assert [len(key) for key in keys] == [300] * 10
