"""Pre-encoding: what stands in the output, and that stopping, repeating and sharing the work change none of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import yaml

from autoencoders.codec import Codec
from stack.data.dataset import LatentData, LatentDataset
from stack.data.images import decode_image, to_bucket
from stack.data.schema import load_manifest, sample_from_bytes
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.files import lock
from stack.text.encoders import TextConfig, TextEncoders

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """All that counts: an index also says when its shard was written."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.endswith(".npz")}


def configuration(stage, out: Path) -> Path:
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**values, "out": str(out)}))
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.cli", "preencode", str(config)]
    threads = str(torch.get_num_threads())  # sums depend on their number, and the bytes are held against this process's
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_samples_are_what_the_encoders_say(stage):
    source, encoded = ShardSet(index_shards(stage.shards)), ShardSet(index_shards(stage.encoded))
    assert encoded.num_samples == source.num_samples == 96
    manifest = load_manifest(stage.encoded)
    codec = Codec.load(str(stage.codec))
    text = TextEncoders(TextConfig(**{name: str(stage.encoders / name) for name in ("t5", "clip_l", "clip_g")}))
    for number in (0, 17, 95):
        shard, row = source.locate(number)
        reader = ShardReader(source.indices)
        caption = reader.read(shard, row, "txt").decode()
        sample = sample_from_bytes(ShardReader(encoded.indices).read(*encoded.locate(number), "safetensors"))
        facts = json.loads(ShardReader(encoded.indices).read(*encoded.locate(number), "json"))
        assert (facts["caption"], encoded.key(number)) == (caption, source.key(number))
        pixels = to_bucket(decode_image(reader.read(shard, row, "png")), tuple(facts["bucket"]))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        moments = codec.encode(image)
        assert sample.latent_mean.dtype == torch.bfloat16
        torch.testing.assert_close(sample.latent_mean.float(), moments.mean_BCHW[0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(sample.latent_logvar.float(), moments.logvar_BCHW[0], rtol=1e-2, atol=1e-3)
        expected = text.encode([caption])[0]
        for name in ("t5", "clip_l", "clip_g", "pooled"):
            torch.testing.assert_close(
                getattr(sample.text, name).float(), getattr(expected, name), rtol=1e-2, atol=1e-2
            )
    assert manifest.scale == codec.affine.scale
    empty = text.encode([""])[0]
    torch.testing.assert_close(manifest.empty_text.t5.float(), empty.t5, rtol=1e-2, atol=1e-2)


def test_the_manifest_has_the_statistics_of_the_latent(stage):
    data = LatentDataset(LatentData(path=stage.encoded, batch_size=8, validation_share=0.0), seed=0)
    values = []
    for batch in data.loader(0, 12, 0, 1, 1):
        values.append(batch.mean_BCHW.double().transpose(0, 1).flatten(1))
    mean = torch.cat(values, dim=1).mean(1)
    # A dozen batches hold each sample once, up to what is left over in the buckets.
    torch.testing.assert_close(torch.tensor(data.manifest.latent_mean, dtype=torch.float64), mean, rtol=0.1, atol=0.05)
    assert all(std > 0 for std in data.manifest.latent_std)


def test_done_again_nothing_is_done(stage, mmdit):
    before = {p: p.stat().st_mtime_ns for p in stage.encoded.iterdir()}
    assert mmdit("preencode", stage.folder / "preencode.yaml").returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stage.encoded.iterdir()} == before


def test_a_kill_and_two_workers_give_the_same_bytes(stage, tmp_path):
    config = configuration(stage, tmp_path / "out")
    process = start(config)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(".*.tar.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "manifest.json").exists()
    workers = [start(config), start(config)]
    errors = [worker.communicate(timeout=240)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert contents(tmp_path / "out") == contents(stage.encoded)


def test_a_shard_under_another_workers_lock_is_left_to_it(stage, tmp_path, mmdit):
    config = configuration(stage, tmp_path / "out")
    with lock(tmp_path / "out" / ".locks" / "00001") as mine:
        assert mine
        done = mmdit("preencode", config)
    assert done.returncode == 0
    assert "other workers still have shards in hand" in done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00002.tar"}
    assert mmdit("preencode", config).returncode == 0
    assert contents(tmp_path / "out") == contents(stage.encoded)


def test_plain_webdataset_opens_the_shards(stage):
    import webdataset

    shards = [str(path) for path in sorted(stage.encoded.glob("*.tar"))]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert keys == [f"{number:09d}" for number in range(96)]


def test_a_shard_without_samples_is_finished_too(stage, tmp_path, mmdit):
    """An empty shard that a kill left unfinished must not keep the manifest from being written."""
    source = tmp_path / "shards"
    shutil.copytree(stage.shards, source)
    with tarfile.open(source / "00003.tar", "w"):
        pass
    config = configuration(stage, tmp_path / "out")
    assert mmdit("preencode", config, f"source={source}").returncode == 0
    for name in ("manifest.json", "00003.tar", "00003_stats.json"):
        (tmp_path / "out" / name).unlink()
    assert mmdit("preencode", config, f"source={source}").returncode == 0
    assert load_manifest(tmp_path / "out").shards["00003.tar"].samples == 0


@pytest.mark.parametrize("pad", ["trim", "full"])
def test_lengths_follow_the_padding(stage, tmp_path, mmdit, pad):
    config = configuration(stage, tmp_path / "out")
    assert mmdit("preencode", config, f"text.pad={pad}", "text.t5_max_tokens=32").returncode == 0
    lengths = ShardSet(index_shards(tmp_path / "out")).caption_length
    assert (lengths == 77).all() if pad == "full" else (lengths < 30).all()


def test_without_clip_tokens_samples_hold_the_pooled_vector_alone(stage, tmp_path, mmdit):
    config = configuration(stage, tmp_path / "out")
    assert mmdit("preencode", config, "text.clip_tokens=false").returncode == 0
    assert not load_manifest(tmp_path / "out").clip_tokens
    shards = ShardSet(index_shards(tmp_path / "out"))
    sample = sample_from_bytes(ShardReader(shards.indices).read(*shards.locate(0), "safetensors"))
    assert (sample.text.clip_l.shape, sample.text.clip_g.shape) == ((0, 48), (0, 80))
    assert len(sample.text.t5) == shards.caption_length[0] > 0
    assert sample.text.pooled.abs().sum() > 0
