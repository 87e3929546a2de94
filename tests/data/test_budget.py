"""The error budget: below it the rest is used and the broken samples are listed, above it one line says what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from stack.config import UserError
from stack.data.dataset import ImageData, ImageDataset
from stack.data.safety import RejectLog
from stack.data.shards import index_shards

REMEDY = "mend the shards or raise max_rejected"


def _write(folder: Path, pack, sample, picture, image: bytes, caption: bytes) -> Path:
    """20 samples in two shards, each with one of this image and caption, and one whose pixels are cut."""

    def cut(key: str) -> list[tuple[str, bytes]]:
        members = dict(sample(key))
        members[f"{key}.png"] = picture(1, size=(64, 64))[:-30]
        return list(members.items())

    for number in range(2):
        keys = [f"{number}{letter}" for letter in "abcdefgh"]
        members = [member for key in keys for member in sample(key, 3)]
        members += [(f"{number}no.png", image), (f"{number}no.txt", caption), *cut(f"{number}cut")]
        pack(folder / f"{number}.tar", members)
    return folder


@pytest.fixture
def shards(tmp_path, pack, sample, picture) -> Path:
    """Shards with two samples that have no caption, as their indices show. Pre-encoding needs captions."""
    return _write(tmp_path / "shards", pack, sample, picture, picture(1), b" ")


@pytest.fixture
def images(tmp_path, pack, sample, picture) -> Path:
    """Shards with two samples that have no image, as their indices show. Training needs images."""
    return _write(tmp_path / "images", pack, sample, picture, b"no image", b"a caption")


LISTED = {"0no": "empty caption", "1no": "empty caption", "0cut": "image not decodable", "1cut": "image not decodable"}
OF_IMAGES = {**LISTED, "0no": "image not readable", "1no": "image not readable"}


def kinds(rejected: dict[str, str]) -> dict[str, str]:
    return {key: reason.partition(":")[0] for key, reason in rejected.items()}


def refusal(done) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert REMEDY in line
    return line


def preencode(mmdit, stage, shards: Path, out: Path, most: float):
    return mmdit("preencode", stage.folder / "preencode.yaml", f"source={shards}", f"out={out}", f"max_rejected={most}")


def tree(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if not path.is_dir()}


def test_below_the_budget_encoding_goes_on_and_lists_shard_key_and_reason(mmdit, stage, tmp_path, shards, listed):
    done = preencode(mmdit, stage, shards, tmp_path / "out", 0.2)  # 4 of 20 are not more than a fifth
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "rejected.jsonl"
    assert kinds(listed(path)) == LISTED
    assert [json.loads(line)["shard"] for line in path.read_text().splitlines()] == ["0.tar", "0.tar", "1.tar", "1.tar"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["rejected"]) == (16, 4)


def test_above_it_by_the_indices_alone_nothing_is_encoded(mmdit, stage, tmp_path, shards, listed):
    line = refusal(preencode(mmdit, stage, shards, tmp_path / "out", 0.09))
    assert "2 of 20 samples are broken (2 × empty caption), more than max_rejected = 0.09" in line
    assert str(tmp_path / "out" / "rejected.jsonl") in line
    assert tree(tmp_path / "out") == {"rejected.jsonl"}
    assert kinds(listed(tmp_path / "out" / "rejected.jsonl")) == {"0no": "empty caption", "1no": "empty caption"}


def test_above_it_by_the_pixels_finished_shards_stay_and_nothing_half_done_does(mmdit, stage, tmp_path, shards, listed):
    out = tmp_path / "out"
    line = refusal(preencode(mmdit, stage, shards, out, 0.15))  # the fourth of 20 is one too many
    assert re.search(r"4 of 20 samples are broken \(2 × (empty caption|image not decodable), 2 × ", line)
    whole = {f"{number}{ending}" for number in (0, 1) for ending in (".tar", ".index.safetensors", "_stats.json")}
    assert tree(out) == {*whole, "rejected.jsonl"}
    assert kinds(listed(out / "rejected.jsonl")) == LISTED
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert "4 of 20" in refusal(preencode(mmdit, stage, shards, out, 0.15))  # as it was, not shard by shard
    assert not (out / "manifest.json").exists()
    assert preencode(mmdit, stage, shards, out, 0.2).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == written
    assert (out / "manifest.json").exists()


def test_images_too_small_for_the_configuration_do_not_count(mmdit, stage, tmp_path, pack, sample, picture):
    members = [member for number in range(8) for member in sample(f"s{number}", number)]
    members += [("big.png", picture(1, size=(64, 64))), ("big.txt", b"large enough")]
    pack(tmp_path / "shards" / "0.tar", members)
    done = mmdit(
        *("preencode", stage.folder / "preencode.yaml", f"source={tmp_path}/shards", f"out={tmp_path}/out"),
        *("max_rejected=0", "min_side=40"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rejected"] == 8


def train(mmdit, stage, shards: Path, run: Path, most: float, *overrides: str):
    options = (f"run.dir={run}", f"data.source={shards}", f"data.max_rejected={most}", "data.validation_share=0")
    return mmdit("train", stage.folder / "autoencoder.yaml", *options, "data.batch_size=4", *overrides)


def test_below_the_budget_training_goes_on_and_lists_shard_key_and_reason(mmdit, stage, tmp_path, images, listed):
    done = train(mmdit, stage, images, tmp_path / "run", 0.2, "schedule.steps=5")
    assert done.returncode == 0, done.stderr
    assert kinds(listed(tmp_path / "run" / "rejected.jsonl")) == OF_IMAGES
    train(mmdit, stage, images, tmp_path / "run", 0.2, "schedule.steps=5")  # goes on, with nothing left to do
    assert kinds(listed(tmp_path / "run" / "rejected.jsonl")) == OF_IMAGES
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(mmdit, stage, images, tmp_path / "run", 0.2, "schedule.steps=1")  # a new run
    assert len(listed(tmp_path / "run" / "rejected.jsonl")) < 4


def test_above_it_by_the_indices_alone_training_does_not_begin(mmdit, stage, tmp_path, images, listed):
    line = refusal(train(mmdit, stage, images, tmp_path / "run", 0.05))
    assert "2 of 20 samples are broken (2 × image not readable), more than max_rejected = 0.05" in line
    assert tree(tmp_path / "run") == {".lock", "rejected.jsonl"}
    assert kinds(listed(tmp_path / "run" / "rejected.jsonl")) == {
        "0no": "image not readable",
        "1no": "image not readable",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_above_it_by_the_pixels_training_ends_with_one_line(workers, mmdit, stage, tmp_path, images, listed):
    """From a loader's process too, whose traceback torch would put into the line."""
    options = (f"data.workers={workers}", "schedule.steps=5", "checkpoint.every=5")
    line = refusal(train(mmdit, stage, images, tmp_path / "run", 0.15, *options))
    assert "4 of 20 samples are broken" in line
    assert "image not decodable" in line
    assert kinds(listed(tmp_path / "run" / "rejected.jsonl")) == OF_IMAGES
    assert not list((tmp_path / "run").rglob("COMPLETE"))


@pytest.fixture
def cut(tmp_path, pack, sample) -> Path:
    """60 samples, 8 of them with cut pixels: more than an eighth, which the indices do not tell."""
    members = [member for row in range(60) for member in sample(f"{row:02}", row % 16)]
    broken = {f"{row:02}.png" for row in range(4, 60, 7)}
    pack(tmp_path / "cut" / "0.tar", [(name, data[:-30] if name in broken else data) for name, data in members])
    return tmp_path / "cut"


def life(shards: Path, log: Path, workers: int = 0, most: float = 0.125) -> ImageDataset:
    config = ImageData(source=str(shards), batch_size=4, validation_share=0, workers=workers, max_rejected=most)
    return ImageDataset(config, seed=0, rejected=RejectLog(log))


def test_the_budget_is_that_of_all_workers_together(tmp_path, cut, listed):
    data, log = life(cut, tmp_path / "rejected.jsonl", workers=2), tmp_path / "rejected.jsonl"
    with pytest.raises(UserError, match="8 of 60 samples are broken"):
        list(data.loader(0, 15, 0, 1, 1))
    assert len(listed(log)) == 8


def test_the_budget_is_that_of_all_ranks_together(tmp_path, cut, listed):
    log = tmp_path / "rejected.jsonl"
    ranks = [life(cut, log).loader(0, 15, rank, 2, 1) for rank in range(2)]
    with pytest.raises(UserError, match="8 of 60 samples are broken"):
        list(zip(*ranks, strict=True))
    assert len(listed(log)) == 8


def test_the_budget_is_that_of_all_lives_of_a_run_together(tmp_path, cut, listed):
    log = tmp_path / "rejected.jsonl"
    list(life(cut, log).loader(0, 8, 0, 1, 1))
    assert 0 < len(listed(log)) < 8
    with pytest.raises(UserError, match="8 of 60 samples are broken"):
        list(life(cut, log).loader(8, 15, 0, 1, 1))


def test_a_list_above_the_budget_begins_anew_for_what_was_mended_since(tmp_path, cut, pack, sample):
    log = tmp_path / "rejected.jsonl"
    with pytest.raises(UserError, match="8 of 60 samples are broken"):
        list(life(cut, log).loader(0, 15, 0, 1, 1))
    life(cut, log, most=0.5)
    assert len(log.read_text().splitlines()) == 8
    pack(cut / "0.tar", [member for row in range(60) for member in sample(f"{row:02}", row % 16)])
    index_shards(cut, rebuild=True)
    assert len(list(life(cut, log).loader(0, 15, 0, 1, 1))) == 15
    assert not log.exists()


def test_what_indices_reject_counts_on_every_rank(tmp_path, images):
    log = tmp_path / "rejected.jsonl"
    for _ in range(2):
        data = life(images, log, most=0.15)
        assert len(log.read_text().splitlines()) == 2
    with pytest.raises(
        UserError, match=r"4 of 20 samples are broken \(2 × image not readable, 2 × image not decodable\)"
    ):
        list(data.loader(0, 5, 1, 2, 1)), list(data.loader(0, 5, 0, 2, 1))


def test_a_line_that_a_kill_cut_short_is_no_matter(tmp_path):
    path = tmp_path / "rejected.jsonl"
    first, second = RejectLog(path), RejectLog(path)
    assert first.add("a.tar", "0", "no image")
    with path.open("a") as file:
        file.write('{"shard": "a.t')
    assert [second.add("a.tar", key, "no image") for key in "001"] == [False, False, True]
    assert second.add("a.tar", "2", "no image")
    assert not first.add("a.tar", "2", "no image")


def test_the_image_that_stands_in_for_a_broken_one_is_called_by_its_own_name(tmp_path, images):
    config = ImageData(source=str(images), batch_size=1, validation_share=0, max_rejected=1)
    data = ImageDataset(config, seed=0, rejected=RejectLog(tmp_path / "rejected.jsonl"))
    keys = [batch.keys[0] for batch in data.loader(0, data.num_samples, 0, 1, 1)]
    assert len(keys) == 18
    assert not {"0cut", "1cut"} & set(keys)


def test_samples_of_one_name_in_two_shards_are_both_counted(tmp_path, pack, sample):
    for folder in "ab":
        pack(tmp_path / folder / "0.tar", [*sample("good"), ("bad.png", b""), ("bad.txt", b"x")])
    log = RejectLog(tmp_path / "rejected.jsonl")
    source = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    with pytest.raises(UserError, match="2 of 4 samples are broken"):
        ImageDataset(ImageData(source=source, batch_size=1, max_rejected=0.4), seed=0, rejected=log)
    assert len(log.path.read_text().splitlines()) == 2


def test_a_shard_without_the_last_caption_is_trained_on(mmdit, stage, tmp_path, pack, picture):
    """Of three captions a sample may have any; a shard of which none has the third has fewer columns in its index."""
    for number, names in enumerate(["abc", "ab", "a"]):
        members = []
        for row in range(8):
            fields = {name: f"caption {name} of {row}" for name in names}
            data = {"png": picture(row), "txt": b"text", "json": json.dumps(fields).encode()}
            members += [(f"{number}{row}.{extension}", content) for extension, content in data.items()]
        pack(tmp_path / "shards" / f"{number}.tar", members)
    config = tmp_path / "preencode.yaml"

    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    captions = {name: f"json.{name}" for name in "abc"}
    own = {"source": str(tmp_path / "shards"), "out": str(tmp_path / "out"), "captions": captions}
    config.write_text(yaml.safe_dump({**values, **own}, sort_keys=False))
    done = mmdit("preencode", config)
    assert done.returncode == 0, done.stderr
    own = {"run": {"dir": str(tmp_path / "run")}, "data": {"path": str(tmp_path / "out")}}
    config = stage.train_config("captions", **own, schedule={"steps": 1})
    done = mmdit("train", config)
    assert done.returncode == 0, done.stderr


def test_a_broken_stats_file_means_that_its_shard_is_done_again(mmdit, stage, tmp_path, pack, sample):
    pack(tmp_path / "shards" / "0.tar", [member for number in range(4) for member in sample(f"s{number}", number)])
    assert preencode(mmdit, stage, tmp_path / "shards", tmp_path / "out", 0).returncode == 0
    before = (tmp_path / "out" / "0.tar").read_bytes()
    for broken in (b"[]", b"[" * 10**5):
        (tmp_path / "out" / "0_stats.json").write_bytes(broken)
        (tmp_path / "out" / "0.tar").write_bytes(b"spoilt")
        done = preencode(mmdit, stage, tmp_path / "shards", tmp_path / "out", 0)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "0.tar").read_bytes() == before


def test_a_source_that_is_encoded_already_is_one_line(mmdit, stage, tmp_path):
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={stage.encoded}", f"out={tmp_path}/out")
    assert done.returncode == 2
    assert "00000.tar holds pre-encoded samples; name raw shards" in done.stderr
