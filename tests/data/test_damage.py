"""Shards cut anywhere and flipped anywhere: what comes out was put in, rightly paired, and the user is told."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from stack.config import UserError
from stack.data import latents
from stack.data.buckets import BucketConfig
from stack.data.dataset import ImageData, ImageDataset, LatentData, LatentDataset
from stack.data.images import decode_image
from stack.data.index import ShardIndex, build_index
from stack.data.shards import ShardReader, index_shards

CHANGED = re.compile(r"whole\.tar: the shard changed since it was indexed .*: mmdit data index \S+$")
ANOTHER = re.compile(r"whole\.tar: .* manifest\.json says .*: restore the shard, or encode again into a new folder$")
ROOT = Path(__file__).parents[2]
KEYS = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory, pack, sample) -> Path:
    """A small shard; the last sample's image is a JPEG, whose pixels have no check sum."""
    members = [member for number, key in enumerate(KEYS) for member in sample(key, 3 * number)]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=95)
    members[-3] = ("four.jpg", stream.getvalue())
    return pack(tmp_path_factory.mktemp("raw") / "whole.tar", members)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, raw, mmdit, stage) -> Path:
    """The same, pre-encoded."""
    out = tmp_path_factory.mktemp("encoded") / "set"
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={raw}", f"out={out}")
    assert done.returncode == 0, done.stderr
    return out


def content(tar: Path) -> dict[str, dict[str, bytes]]:
    """key → extension → bytes, by Python's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = file.extractfile(member).read()  # type: ignore[union-attr]
    return found


def end_of(data: bytes) -> int:
    """Where a tar's two blocks of zeros end; the rest is padding."""
    length = len(data.rstrip(b"\0"))
    return length + -length % 512 + 1024


def image_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1).float() / 127.5 - 1


def images(folder: Path, **keys: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """One epoch of training on a folder of raw shards."""
    config = ImageData(source=str(folder), batch_size=1, validation_share=0, max_rejected=1, **keys)
    data = ImageDataset(config, seed=0)
    for batch in data.loader(0, data.num_samples, 0, 1, 1):
        yield batch.keys[0], batch.image_BCHW[0]


def encode(mmdit, stage, source: Path, out: Path) -> tuple[str, dict[str, dict[str, dict[str, bytes]]]]:
    """(what was said, shard → its content) of pre-encoding a folder of raw shards."""
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={source}", f"out={out}", "max_rejected=1")
    assert done.returncode == 0, done.stderr
    return done.stderr, {path.stem: content(path) for path in sorted(out.glob("*.tar"))}


def close(one: bytes, other: bytes) -> bool:
    """Whether two pre-encoded samples agree, up to the sums of batches of other sizes."""
    left, right = load(one), load(other)
    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and torch.allclose(left[name].float(), right[name].float(), atol=2e-2)
        for name in left
    )


# ---- cuts


@pytest.fixture(scope="module")
def cut(tmp_path_factory, raw) -> Path:
    """A folder of copies of the shard, named after the byte that each is cut at."""
    folder, data = tmp_path_factory.mktemp("cut"), raw.read_bytes()
    for at in range(0, end_of(data) + 1, 512):
        (folder / f"{at:06}.tar").write_bytes(data[:at])
    return folder


def whole(raw: Path) -> str:
    """Name of the copy that lacks nothing."""
    return f"{end_of(raw.read_bytes()):06}"


def damaged(said: str) -> set[str]:
    return set(re.findall(r"/(\d+)\.tar: shard truncated at byte \d+: \d samples of it are used", said))


def test_images_of_a_shard_cut_anywhere_are_their_own_or_absent(cut, raw, capsys):
    truth = {key: image_of(members.get("png", members.get("jpg", b""))) for key, members in content(raw).items()}
    seen = list(images(cut))
    for key, image in seen:
        assert torch.equal(image, truth[key])
    counts = [len(index) for index in index_shards(cut)]
    assert counts == sorted(counts)
    assert (set(counts), len(seen)) == ({0, 1, 2, 3, 4}, sum(counts))
    assert damaged(capsys.readouterr().err) == {path.stem for path in cut.glob("*.tar")} - {whole(raw)}


def test_training_goes_on_with_what_a_cut_shard_holds_and_names_it(cut, raw, mmdit, stage, tmp_path, listed):
    options = (f"run.dir={tmp_path}/run", f"data.source={cut}", "data.max_rejected=1", "schedule.steps=2")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert len(damaged(done.stderr)) == len(list(cut.glob("*.tar"))) - 1
    assert set(listed(tmp_path / "run" / "rejected.jsonl")) == set(KEYS)


def test_samples_encoded_from_a_shard_cut_anywhere_are_their_own_or_absent(cut, raw, mmdit, stage, tmp_path, listed):
    said, shards = encode(mmdit, stage, cut, tmp_path / "out")
    truth = shards[whole(raw)]
    assert list(truth) == KEYS
    for members in shards.values():
        assert list(members) == KEYS[: len(members)]
        for key, parts in members.items():
            assert json.loads(parts["json"]) == json.loads(truth[key]["json"])
            assert json.loads(parts["json"])["caption"] == f"a picture of number {3 * KEYS.index(key)}"
            assert close(parts["safetensors"], truth[key]["safetensors"])
    assert damaged(said) == shards.keys() - {whole(raw)}
    assert set(listed(tmp_path / "out" / "rejected.jsonl")) == set(KEYS)


def latent_data(folder: Path) -> LatentDataset:
    return LatentDataset(LatentData(path=str(folder), batch_size=1, validation_share=0), seed=0)


def problem(folder: Path) -> str:
    """Why the set is refused, or "" if it is not."""
    try:
        latent_data(folder)
    except UserError as error:
        return str(error)
    return ""


def tensors_of(shard: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What `latents.read` gives of all samples that an index of the shard has."""
    index = build_index(shard)
    return {
        key: {name: tensor[0] for name, tensor in latents.read(ShardReader([index]), [(0, row, 0)]).items()}
        for row, key in enumerate(index.keys)
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def copy(encoded, tmp_path) -> Path:
    """A copy of the pre-encoded set whose shard can be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("manifest.json", "whole.tar"):
        (folder / name).write_bytes((encoded / name).read_bytes())
    index_shards(folder)
    assert latent_data(folder).num_samples == len(KEYS)
    return folder


def test_a_pre_encoded_shard_cut_anywhere_is_refused_by_name(encoded, copy):
    shard, data, truth = copy / "whole.tar", (encoded / "whole.tar").read_bytes(), tensors_of(encoded / "whole.tar")
    counts = []
    for at in range(0, end_of(data), 512):
        shard.write_bytes(data[:at])
        assert CHANGED.search(problem(copy))
        [index] = index_shards(copy, rebuild=True)
        assert index.damage == f"truncated at byte {at}"
        assert ANOTHER.search(problem(copy))
        found = tensors_of(shard)
        assert list(found) == KEYS[: len(found)]
        assert all(equal(found[key], truth[key]) for key in found)
        counts.append(len(found))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3, 4}
    shard.write_bytes(data)
    index_shards(copy, rebuild=True)
    assert latent_data(copy).num_samples == len(KEYS)


def test_training_on_a_cut_pre_encoded_shard_says_what_to_do_at_each_step(copy, mmdit, stage, tmp_path):
    shard = copy / "whole.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    config = stage.train_config("cut", run={"dir": str(tmp_path / "run")}, data={"path": str(copy)})
    done = mmdit("train", config)
    assert done.returncode == 2
    command = re.search(r"whole\.tar: the shard changed since it was indexed .*: mmdit (data index \S+)", done.stderr)
    assert command is not None, done.stderr
    indexed = mmdit(*command[1].split())
    assert (indexed.returncode, "truncated at byte" in indexed.stdout) == (0, True)
    done = mmdit("train", config)
    assert done.returncode == 2
    assert re.search(r"whole\.tar: \d samples, manifest\.json says 4: restore the shard", done.stderr)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_pre_encoded_shard_that_is_cut_while_it_is_trained_on_is_one_line(copy):
    """It is mapped into memory: what lies behind the end of the file would kill the process."""
    batches = latent_data(copy).loader(0, 1000, 0, 1, 1)
    next(batches)
    os.truncate(copy / "whole.tar", 4096)
    with pytest.raises(UserError, match="the shard changed since it was indexed"):
        next(batches)


def test_a_process_that_ends_by_an_error_does_not_wait_for_its_loaders(encoded):
    """They leave SIGTERM to the rank, and by SIGTERM multiprocessing ends what an error left running."""
    code = f"""
from stack.data.dataset import LatentData, LatentDataset
data = LatentDataset(LatentData(path={str(encoded)!r}, batch_size=1, validation_share=0, workers=1), seed=0)
batches = data.loader(0, 1000, 0, 1, 1)
next(batches)
raise RuntimeError("the end")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, "RuntimeError: the end")


# ---- flips


def flipped(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]


def places(tar: Path, count: int, seed: int) -> list[tuple[int, int]]:
    """(byte, what it is exclusive-ored with): a quarter in headers, half in members, the rest anywhere."""
    rng, end = random.Random(seed), end_of(tar.read_bytes())
    with tarfile.open(tar) as file:
        members = file.getmembers()
    headers = [member.offset + rng.randrange(512) for member in rng.choices(members, k=count // 4)]
    within = [member.offset_data + rng.randrange(member.size) for member in rng.choices(members, k=count // 2)]
    anywhere = [rng.randrange(end) for _ in range(count - len(headers) - len(within))]
    places = [(at, rng.randrange(1, 256)) for at in [*headers, *within, *anywhere]]
    rng.shuffle(places)
    return places


def owner(tar: Path, at: int) -> tuple[str, str]:
    """(key, extension) of the member whose data byte `at` is, or ("", "")."""
    with tarfile.open(tar) as file:
        for member in file:
            if member.offset_data <= at < member.offset_data + member.size:
                key, _, extension = member.name.partition(".")
                return key, extension
    return "", ""


@pytest.fixture(scope="module")
def flips(tmp_path_factory, raw) -> tuple[Path, list[tuple[str, str]]]:
    """A folder of copies of the shard with one byte changed in each, and whose bytes those are."""
    folder, data, owners = tmp_path_factory.mktemp("flips"), raw.read_bytes(), []
    for number, (at, value) in enumerate(places(raw, 240, seed=1)):
        (folder / f"{number:03}.tar").write_bytes(flipped(data, at, value))
        owners.append(owner(raw, at))
    return folder, owners


def test_images_of_flipped_shards_are_right_or_left_out_or_of_the_jpeg_that_was_hit(flips, raw):
    folder, owners = flips
    truth = {key: image_of(members.get("png", members.get("jpg", b""))) for key, members in content(raw).items()}
    wrong = 0
    for key, image in images(folder, buckets=BucketConfig(resolution=32, max_ratio=1)):
        if not torch.equal(image, truth[key]):
            assert key == "four"
            wrong += 1
    assert 0 < wrong <= sum(extension == "jpg" for _, extension in owners)


def test_samples_encoded_from_flipped_shards_are_right_or_left_out_or_have_no_sum(flips, raw, mmdit, stage, tmp_path):
    folder, owners = flips
    (tmp_path / "some").mkdir()
    for number in range(0, 240, 4):
        os.link(folder / f"{number:03}.tar", tmp_path / "some" / f"{number:03}.tar")
    os.link(raw, tmp_path / "some" / "whole.tar")
    said, shards = encode(mmdit, stage, tmp_path / "some", tmp_path / "out")
    assert "Traceback" not in said
    truth = shards.pop("whole")
    assert list(truth) == KEYS
    for name, members in shards.items():
        key_hit, extension_hit = owners[int(name)]
        for key, parts in members.items():
            same_facts = json.loads(parts["json"]) == json.loads(truth[key]["json"])
            same_tensors = close(parts["safetensors"], truth[key]["safetensors"])
            assert same_facts or (key, "txt") == (key_hit, extension_hit)
            assert same_tensors or (key == key_hit and extension_hit in ("txt", "jpg"))


def test_a_pre_encoded_shard_flipped_anywhere_is_refused_however_often_it_is_indexed(encoded, copy):
    shard, data = copy / "whole.tar", (encoded / "whole.tar").read_bytes()
    for at, value in places(encoded / "whole.tar", 120, seed=2):
        shard.write_bytes(flipped(data, at, value))
        assert CHANGED.search(problem(copy))
        index_shards(copy, rebuild=True)
        assert ANOTHER.search(problem(copy))


def test_a_flip_that_the_file_s_time_hides_changes_its_own_sample_alone_or_is_noticed(encoded, copy):
    """Bits that rot on a disk: nothing is read again to compare it, so the tensors that were hit are what they are."""
    shard, data, truth = copy / "whole.tar", (encoded / "whole.tar").read_bytes(), tensors_of(encoded / "whole.tar")
    stat = shard.stat()
    hit, said = 0, list[str]()
    for at, value in places(encoded / "whole.tar", 200, seed=3):
        shard.write_bytes(flipped(data, at, value))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        set_of = latent_data(copy)
        key_hit, extension_hit = owner(encoded / "whole.tar", at)
        for row in range(len(KEYS)):
            key = set_of.shards.key(row)
            try:
                found = {n: t[0] for n, t in latents.read(set_of._reader, [(0, row, 0)]).items()}
            except UserError as error:
                said.append(str(error))
                found = {}
            if equal(found, truth[key]):
                continue
            assert key == key_hit or extension_hit == ""  # its own tensors, or its header in the tar
            hit += bool(found)
            assert not found or sum(not torch.equal(found[name], truth[key][name]) for name in found) == 1
    assert hit > 0
    assert said
    assert all("whole.tar: what stands in the shard is not what was indexed" in line for line in said)


def test_a_flipped_manifest_is_one_line_or_says_the_same(encoded, copy, mmdit, stage, tmp_path):
    manifest, data = copy / "manifest.json", (encoded / "manifest.json").read_bytes()
    config = stage.train_config("manifest", run={"dir": str(tmp_path / "run")}, data={"path": str(copy)})
    rng, refused = random.Random(4), 0
    for _ in range(25):
        manifest.write_bytes(flipped(data, rng.randrange(len(data)), rng.randrange(1, 256)))
        said = problem(copy)
        assert said == "" or str(copy) in said or "data.path" in said
        refused += bool(said)
    assert refused > 0
    for broken in (b"", b"[]", b"null", b"[" * 10**5, b'{"version": 3}', data[:-2], b"\xff" + data):
        manifest.write_bytes(broken)
        done = mmdit("train", config)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert "manifest.json" in done.stderr.strip().splitlines()[-1]


def test_a_broken_index_is_built_anew_or_says_what_to_do(copy):
    [path] = copy.glob("*.index.*")
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(5)
    broken = [flipped(data, rng.randrange(length), rng.randrange(1, 256)) for _ in range(150)]
    broken += [data[:at] for at in range(0, len(data), 97)] + [b"[" * 10**6, (2**60).to_bytes(8, "little") + data[8:]]
    for spoilt in broken:
        path.write_bytes(spoilt)
        assert problem(copy) == ""
        assert path.read_bytes()[length:] == data[length:]


def spoilt_columns(folder: Path) -> Iterator[ShardIndex]:
    """Indices of the folder's shard with one bit changed in each."""
    [path] = folder.glob("*.index.*")
    data, rng = path.read_bytes(), random.Random(6)
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        path.write_bytes(flipped(data, at, 1 << rng.randrange(8)))
        yield from index_shards(folder)


def test_a_flip_in_the_columns_of_an_index_never_pairs_an_image_with_another_caption(raw, tmp_path):
    """They have no check sum, but every member that is read has its name in the tar."""
    (tmp_path / "x.tar").write_bytes(raw.read_bytes())
    index_shards(tmp_path)
    truth, said = content(raw), list[str]()
    for index in spoilt_columns(tmp_path):
        reader = ShardReader([index])
        for row in range(len(index)):
            try:
                found = {name: reader.read(0, row, name) for name in index.extensions if index.has(row, name)}
            except UserError as error:
                said.append(str(error))
            else:
                [key] = (key for key in KEYS if found.items() <= truth[key].items())
                assert index.key(row) == key or not index.key(row).isascii()  # the key itself was hit
    assert len(said) > 20
    assert all("not what was indexed" in line for line in said)


def test_a_flip_in_the_columns_of_a_pre_encoded_index_never_gives_a_sample_to_another_key(encoded, copy):
    truth, said = tensors_of(encoded / "whole.tar"), list[str]()
    for _ in spoilt_columns(copy):
        try:
            for batch in latent_data(copy).loader(0, len(KEYS), 0, 1, 1):
                [key] = (key for key in KEYS if torch.equal(truth[key]["latent_mean"], batch.mean_BCHW[0]))
                assert torch.equal(batch.text.pooled_BD[0], truth[key]["pooled"])
                assert batch.keys[0] == key or not batch.keys[0].isascii()  # the key itself was hit
        except UserError as error:
            said.append(str(error))
    assert len(said) > 20
