"""Pre-encoding: what stands in the output, and that stopping, repeating and sharing the work change none of it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save

from autoencoders.codec import Codec
from stack.claims import Claims
from stack.data.buckets import BucketConfig
from stack.data.dataset import LatentData, LatentDataset
from stack.data.images import decode_image, to_bucket
from stack.data.schema import load_manifest
from stack.data.shards import ShardReader, ShardSet, index_shards
from stack.text.encoders import TextConfig, TextEncoders

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """All that counts: an index also says when its shard was written."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and ".index." not in p.name}


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
        sample = load(ShardReader(encoded.indices).read(*encoded.locate(number), "safetensors"))
        facts = json.loads(ShardReader(encoded.indices).read(*encoded.locate(number), "json"))
        assert (facts["caption"], encoded.key(number)) == (caption, source.key(number))
        pixels = to_bucket(decode_image(reader.read(shard, row, "png")), tuple(facts["bucket"]))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        moments = codec.encode(image)
        assert sample["latent_mean"].dtype == torch.bfloat16
        torch.testing.assert_close(sample["latent_mean"].float(), moments.mean_BCHW[0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(sample["latent_logvar"].float(), moments.logvar_BCHW[0], rtol=1e-2, atol=1e-3)
        expected = text.encode([caption])[0]
        for name in ("t5", "clip_l", "clip_g", "pooled"):
            torch.testing.assert_close(sample[name].float(), getattr(expected, name), rtol=1e-2, atol=1e-2)
    assert manifest.scale == codec.affine.scale
    empty = text.encode([""])[0]
    torch.testing.assert_close(manifest.empty_text.t5.float(), empty.t5, rtol=1e-2, atol=1e-2)


def test_the_manifest_has_the_statistics_of_the_latent(stage):
    data = LatentDataset(LatentData(path=str(stage.encoded), batch_size=8, validation_share=0.0), seed=0)
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


def test_a_shard_in_another_workers_hand_is_left_to_it(stage, tmp_path, mmdit):
    """The second worker does the other shards, waits for the first, and sees it finish."""
    config, out = configuration(stage, tmp_path / "out"), tmp_path / "out"
    with Claims(out / ".claims").hold("00001") as mine:
        assert mine
        worker = start(config)
        deadline = time.monotonic() + 120
        while len(list(out.glob("*_stats.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)
        assert {path.name for path in out.glob("*.tar")} == {"00000.tar", "00002.tar"}
        assert worker.poll() is None
    error = worker.communicate(timeout=120)[1].decode()
    assert worker.returncode == 0, error
    assert f"waiting for shards of other workers: 00001 ({socket.gethostname()}, process {os.getpid()})" in error
    assert contents(out) == contents(stage.encoded)


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
    lengths = [length for index in index_shards(tmp_path / "out") for length in index.caption_length[:, 0].tolist()]
    assert set(lengths) == {77} if pad == "full" else max(lengths) < 30


def test_without_clip_tokens_samples_hold_the_pooled_vector_alone(stage, tmp_path, mmdit):
    config = configuration(stage, tmp_path / "out")
    assert mmdit("preencode", config, "text.clip_tokens=false").returncode == 0
    assert not load_manifest(tmp_path / "out").clip_tokens
    shards = ShardSet(index_shards(tmp_path / "out"))
    sample = load(ShardReader(shards.indices).read(*shards.locate(0), "safetensors"))
    assert (sample["clip_l"].shape, sample["clip_g"].shape) == ((0, 48), (0, 80))
    assert len(sample["t5"]) == shards.indices[0].caption_length[0] > 0
    assert sample["pooled"].abs().sum() > 0


def test_original_size_and_crop_stand_beside_the_sample(stage, tmp_path, mmdit):
    """From KEY.json alone: the image, scaled until it covers the bucket and cropped at left and top, was encoded."""
    sizes = [(100, 100), (100, 80), (97, 331), (200, 50), (64, 40), (41, 40)]
    x, y = np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 400))
    images = [Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).resize(size) for size in sizes]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, image in enumerate(images):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            for extension, data in (("png", stream.getvalue()), ("txt", b"a gradient")):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    done = mmdit("preencode", configuration(stage, tmp_path / "out"), f"source={tmp_path}/shards")
    assert done.returncode == 0, done.stderr

    encoded = ShardSet(index_shards(tmp_path / "out"))
    reader, codec, crops = ShardReader(encoded.indices), Codec.load(str(stage.codec)), []
    for number, image in enumerate(images):
        facts = json.loads(reader.read(*encoded.locate(number), "json"))
        assert (facts["width"], facts["height"]) == image.size
        (width, height), (left, top) = facts["bucket"], facts["crop"]
        scale = max(width / image.width, height / image.height)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        pixels = np.array(resized.crop((left, top, left + width, top + height)))
        moments = codec.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
        sample = load(reader.read(*encoded.locate(number), "safetensors"))
        torch.testing.assert_close(sample["latent_mean"].float(), moments.mean_BCHW[0], rtol=2e-2, atol=1e-2)
        crops.append((left, top))
    assert crops == [(0, 0), (4, 0), (0, 21), (28, 0), (0, 0), (0, 0)]

    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    rule = BucketConfig(resolution=32).rule()
    assert dict(zip(rule.buckets, stats["buckets"], strict=True)) == {(32, 32): 3, (40, 24): 2, (24, 40): 1}
    assert "32×32  ratio 1.00  3   50.0 %" in done.stderr


def test_the_histogram_is_said_again_when_all_was_finished(stage, mmdit):
    stats = [json.loads(path.read_text()) for path in sorted(stage.encoded.glob("*_stats.json"))]
    counts = np.sum([s["buckets"] for s in stats], axis=0).tolist()
    said = mmdit("preencode", stage.folder / "preencode.yaml").stderr
    assert sum(counts) == 96
    for (width, height), count in zip(BucketConfig(resolution=32).rule().buckets, counts, strict=True):
        assert f"{width}×{height}  ratio {width / height:.2f}  {count}  " in said


def test_buckets_that_contradict_themselves_are_refused(stage, mmdit):
    settings = ("buckets.resolution=1024", "buckets.table=sdxl", "buckets.step=64")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *settings)
    assert done.returncode == 2
    assert "buckets: table 'sdxl' has its own sides: leave out step and max_ratio" in done.stderr


def test_what_is_not_finite_is_left_out(stage, tmp_path, mmdit):
    """A broken encoder must not write samples that every later stage stumbles over."""
    codec = tmp_path / "codec"
    shutil.copytree(stage.codec, codec)
    (weights,) = codec.glob("*.safetensors")
    tensors = load(weights.read_bytes())
    tensors["quant_conv.bias"][0] = float("nan")
    weights.write_bytes(save(tensors))
    done = mmdit("preencode", configuration(stage, tmp_path / "out"), f"autoencoder={codec}")
    assert done.returncode == 2
    assert "encoded to values that are not finite" in done.stderr


def test_the_mark_knows_all_that_decides_bytes(stage, tmp_path, mmdit):
    config = configuration(stage, tmp_path / "out")
    assert mmdit("preencode", config).returncode == 0
    for changed in ("text.batch_size=1", "batch_size=7", "buckets.resolution=40", "t5_dtype=float8"):
        done = mmdit("preencode", config, changed)
        assert done.returncode == 2
        assert "made from other sources, encoders or settings" in done.stderr
    for free in ("decoders=1", "max_rejected=0.5"):
        assert mmdit("preencode", config, free).returncode == 0
