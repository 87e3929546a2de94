"""Batches of pre-encoded samples: every tensor as it was stored, whatever the shards, mixtures and captions."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from stack.config import UserError
from stack.data import latents, mlperf
from stack.data.dataset import LatentBatch, LatentData, LatentDataset
from stack.data.plan import BatchPlan, Rows
from stack.data.remote import CacheConfig
from stack.data.schema import EncodedSample, load_manifest, sample_to_bytes, to_float8
from stack.data.shards import ShardReader, index_shards
from stack.text import tokenizer
from stack.text.conditioning import EncodedText
from stack.text.encoders import TextConfig, TextEncoders

SHARED = Path(__file__).parents[2].parent / "shared"


def dataset(path: Any, **keys: Any) -> LatentDataset:
    path = path if isinstance(path, dict) else str(path)
    return LatentDataset(LatentData(path=path, **{"batch_size": 8, "max_validation": 8, **keys}), seed=0)


def batches(data: LatentDataset, steps: int, rank: int = 0, world: int = 1) -> list[LatentBatch]:
    return list(data.loader(0, steps, rank, world, 1))


def stored(data: LatentDataset) -> dict[str, dict[str, torch.Tensor]]:
    """key → tensors, read by the safetensors library."""
    reader = ShardReader(data.shards.indices)
    return {
        data.shards.key(sample): load(reader.read(*data.shards.locate(sample), "safetensors"))
        for sample in range(data.shards.num_samples)
    }


def texts(batch: LatentBatch, at: int) -> dict[str, torch.Tensor]:
    t5, clip = int(batch.text.t5_length_B[at]), int(batch.text.clip_length_B[at])
    assert batch.text.t5_BLD is not None
    assert batch.text.clip_l_BLD is not None
    assert batch.text.clip_g_BLD is not None
    assert batch.text.t5_BLD.shape[1] == max(batch.text.t5_length_B)
    assert batch.text.clip_g_BLD.shape[1] == max(batch.text.clip_length_B)
    for padded, length in ((batch.text.t5_BLD, t5), (batch.text.clip_l_BLD, clip), (batch.text.clip_g_BLD, clip)):
        assert not padded[at, length:].any()
    return {
        "t5": batch.text.t5_BLD[at, :t5],
        "clip_l": batch.text.clip_l_BLD[at, :clip],
        "clip_g": batch.text.clip_g_BLD[at, :clip],
        "pooled": batch.text.pooled_BD[at],
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_is_stored(stage, workers):
    data = dataset(stage.encoded, workers=workers)
    truth, seen = stored(data), []
    steps = next(n for n in range(99) if data.plan.epoch_of(n) > 0)
    for batch in batches(data, steps):
        for at, key in enumerate(batch.keys):
            assert torch.equal(batch.mean_BCHW[at], truth[key]["latent_mean"])
            assert torch.equal(batch.logvar_BCHW[at], truth[key]["latent_logvar"])
            for name, value in texts(batch, at).items():
                assert torch.equal(value, truth[key][name]), name
        seen += batch.keys
    assert len(set(seen)) == len(seen) > 93 - 3 * 8  # three buckets hold back less than a batch each
    held_out = {key for batch in data.validation(3) for key in batch.keys}
    assert len(held_out) == 3  # 3 % of 96
    assert not held_out & set(seen)


def test_ranks_and_restarts_see_the_same_batches(stage):
    whole = batches(dataset(stage.encoded), 6)
    halves = [batches(dataset(stage.encoded), 6, rank, 2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves]
        assert sorted(p for part in parts for p in part.positions) == batch.positions
        assert {k for part in parts for k in part.keys} == set(batch.keys)
    late = list(dataset(stage.encoded).loader(4, 6, 0, 1, 1))
    assert [batch.keys for batch in late] == [batch.keys for batch in whole[4:]]


@pytest.mark.parametrize(("name", "key"), [("./a", "a"), ("././a", "a"), (".//ä/b", "ä/b")])
def test_a_key_is_read_however_its_name_begins(tmp_path, pack, name, key):
    latent, text = torch.randn(2, 4, 2, 2), EncodedText(torch.zeros(3, 8), torch.zeros(2, 8), None, torch.zeros(8))
    data = sample_to_bytes(EncodedSample(latent[0], latent[1], [text]), torch.float32)
    indices = index_shards(pack(tmp_path / "0.tar", [(f"{name}.safetensors", data)], tarfile.GNU_FORMAT))
    assert indices[0].keys == [key]
    (mean_CHW,) = latents.read(ShardReader(indices), [(0, 0, 0)])["latent_mean"]
    assert torch.equal(mean_CHW, latent[0])


def test_headers_that_differ_do_not_fill_the_memory():
    """Those of samples of three captions, as a loader meets them over days."""

    def header(number: int) -> bytes:
        lengths = number % 60, number // 60 % 60, number // 3600
        shapes = {"latent_mean": [16, 32, 32], "latent_logvar": [16, 32, 32]}
        for caption, length in zip(("", ".1", ".2"), lengths, strict=True):
            shapes |= {f"t5{caption}": [length, 4096], f"clip_l{caption}": [length, 768], f"pooled{caption}": [768]}
        entries, at = {}, 0
        for name, shape in shapes.items():
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        return len(text).to_bytes(8, "little") + text

    latents._find_known.cache_clear()
    tracemalloc.start()
    try:
        for number in range(200):
            latents._find_known(header(number), number % 3)
        assert tracemalloc.get_traced_memory()[0] / 200 * latents._find_known.cache_info().maxsize < 60e6
    finally:
        tracemalloc.stop()


def write_source(folder: Path, fields: list[dict[str, Any]], silent: Sequence[int] = ()) -> Path:
    """Samples of KEY.png, KEY.txt but where they are silent, and KEY.json of these fields."""
    folder.mkdir()
    picture = io.BytesIO()
    from PIL import Image

    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, field in enumerate(fields):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 99, 5)).save(picture, "PNG")
            members = {"png": picture.getvalue(), "json": json.dumps(field).encode()}
            if number not in silent:
                members["txt"] = f"number {number}".encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def preencode(stage, mmdit, out: Path, *overrides: str) -> Path:
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"out={out}", *overrides)
    assert done.returncode == 0, done.stderr
    return out


def test_of_several_captions_each_epoch_draws_one(stage, tmp_path, mmdit):
    longs = [f"a much longer caption about the number {number}" for number in range(40)]
    source = write_source(tmp_path / "raw", [{"long": long} if at % 4 else {} for at, long in enumerate(longs)])
    out = preencode(stage, mmdit, tmp_path / "out", f"source={source}", "captions={short: txt, long: json.long}")
    assert load_manifest(out).captions == ["short", "long"]
    data = dataset(out, validation_share=0, captions={"short": 1, "long": 3})
    encoder = TextEncoders(TextConfig(**{name: str(stage.encoders / name) for name in ("t5", "clip_l", "clip_g")}))
    expected = [encoder.encode([f"number {at}", long]) for at, long in enumerate(longs)]
    chosen: dict[str, list[int]] = {}
    for batch in batches(data, 50):  # ten epochs
        for at, key in enumerate(batch.keys):
            pair = [text.t5.bfloat16() for text in expected[int(key)]]
            found = texts(batch, at)["t5"]
            which = int(len(found) == len(pair[1]))
            torch.testing.assert_close(found, pair[which], rtol=1e-2, atol=1e-2)
            chosen.setdefault(key, []).append(which)
    assert {len(drawn) for drawn in chosen.values()} == {10}
    assert not any(which for key, drawn in chosen.items() if int(key) % 4 == 0 for which in drawn)
    share = np.mean([which for key, drawn in chosen.items() if int(key) % 4 for which in drawn])
    assert abs(share - 0.75) < 0.08
    index = data.shards.indices[0]
    assert index.caption_length.shape == (40, 2)
    assert (index.caption_length[::4, 1] == -1).all()
    with pytest.raises(UserError, match=r"no caption 'blip', it has short, long"):
        dataset(out, captions={"blip": 1})


def test_a_first_caption_that_is_missing_costs_the_sample(stage, tmp_path, mmdit):
    source = write_source(tmp_path / "raw", [{"long": "x" if at else 7} for at in range(30)])
    out = preencode(stage, mmdit, tmp_path / "out", f"source={source}", "captions={long: json.long}")
    assert load_manifest(out).samples == 29
    assert "no caption: json.long is a number, expected text" in (out / "rejected.jsonl").read_text()


def test_captions_may_stand_in_json_alone(stage, tmp_path, mmdit):
    source = write_source(tmp_path / "raw", [{"long": f"a picture of {at}"} for at in range(30)], silent=range(1, 30))
    out = preencode(stage, mmdit, tmp_path / "json", f"source={source}", "captions={long: json.long}")
    assert (load_manifest(out).samples, load_manifest(out).rejected) == (30, 0)
    out = preencode(stage, mmdit, tmp_path / "txt", f"source={source}", "max_rejected=1")
    assert (load_manifest(out).samples, load_manifest(out).rejected) == (1, 29)
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"out={tmp_path / 'few'}", f"source={source}")
    assert (done.returncode, "29 of 30 samples are broken (29 × no caption)" in done.stderr) == (2, True)
    assert "no caption: txt is missing" in (out / "rejected.jsonl").read_text()
    small = (f"out={tmp_path / 'small'}", f"source={source}", "min_side=64")
    done = mmdit("preencode", stage.folder / "preencode.yaml", *small)
    assert "no caption" not in done.stderr  # images that are left out need none
    assert "not one sample could be encoded" in done.stderr


def test_float8_t5_has_half_the_bytes_and_the_same_direction(stage, tmp_path, mmdit):
    out = preencode(stage, mmdit, tmp_path / "out", "t5_dtype=float8")
    plain, eighth = dataset(stage.encoded), dataset(out)
    truth = stored(eighth)
    for one, other in zip(batches(plain, 5), batches(eighth, 5), strict=True):
        assert one.keys == other.keys
        assert other.text.t5_BLD is not None
        assert other.text.t5_BLD.dtype == torch.float8_e4m3fn
        assert torch.equal(other.text.t5_BLD[0, :3].float(), truth[other.keys[0]]["t5"][:3].float())
        exact, rounded = one.to(torch.device("cpu")).text.t5_BLD, other.to(torch.device("cpu")).text.t5_BLD
        assert exact is not None
        assert rounded is not None
        mask = torch.arange(exact.shape[1]) < one.text.t5_length_B[:, None]
        cosine = torch.nn.functional.cosine_similarity(exact.float(), rounded.float(), dim=-1)
        assert cosine[mask].min() > 0.999
        assert not rounded[~mask].any()


def test_float8_keeps_tokens_of_any_scale():
    """T5-XXL has channels a hundred times as large as the rest; a scale a token keeps directions all the same."""
    embedding = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    embedding[:, 7] *= 300
    embedding *= torch.logspace(-6, 6, 64)[:, None]
    stored_LD, scale_L = to_float8(embedding)
    restored = stored_LD.float() * scale_L[:, None]
    assert torch.nn.functional.cosine_similarity(embedding, restored, dim=-1).min() > 0.999
    assert (to_float8(torch.zeros(2, 8))[0].float() == 0).all()


def test_mixtures_of_data_sets(stage, tmp_path):
    """Two sets, told apart by their keys: weights decide how often each is drawn."""
    other = tmp_path / "other"
    shutil.copytree(stage.encoded, other)
    data = dataset({str(stage.encoded): 3.0, str(other): 1.0}, validation_share=0)
    first = len(data.shards.indices) // 2
    drawn = [data.shards.locate(int(id))[0] >= first for n in range(24) for id in data.plan.batch(n).id]
    assert np.mean(drawn) == 0.25
    assert all(0 < sum(drawn[at : at + 24]) < 24 for at in range(0, 192, 24))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "scale": 9.0}))
    with pytest.raises(UserError, match=r"encoded and .*other differ in scale: .* and 9.0"):
        dataset({str(stage.encoded): 3.0, str(other): 1.0})


def test_mlperf_shards_are_a_source(stage, tmp_path, mmdit, monkeypatch):
    """The layout at the widths of the small encoders: what is written holds the same numbers."""
    for name, value in {"CHANNELS": 4, "TOKENS": 16, "T5_DIM": 128, "CLIP_DIM": 48, "FACTOR": 4}.items():
        monkeypatch.setattr(mlperf, name, value)
    generator, truth = torch.Generator().manual_seed(0), {}
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "00000.tar", "w") as tar:
        for number in range(12):
            shapes = {"mean": (4, 8, 8), "logvar": (4, 8, 8), "t5": (16, 128), "clip": (48,)}
            tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
            truth[f"{number:04}"] = tensors
            if number == 7:
                tensors["logvar"][0, 0, 0] = 800  # finite, the variance is not
            members = {f"{name}.bytes": bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}
            if number == 5:
                members["t5.bytes"] = members["t5.bytes"][:-1]
            for extension, data in {"json": b'{"caption": "a cat"}', **members}.items():
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    overrides = (f"source={tmp_path}/raw", "max_rejected=0.2", "text.pad=full", "text.clip_tokens=false")
    overrides = (*overrides, "text.clip_projection=false")
    wrong = mmdit("preencode", stage.folder / "preencode.yaml", f"out={tmp_path}/x", *overrides, "text.clip_g=null")
    assert wrong.returncode == 2
    assert "MLPerf's samples need text.t5_max_tokens=16" in wrong.stderr
    out = preencode(stage, mmdit, tmp_path / "out", *overrides, "text.t5_max_tokens=16", "text.clip_g=null")
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in rejected] == ["0005", "0007"]
    assert rejected[1]["reason"] == "variance too large: .logvar.bytes has e^800"
    found = stored(dataset(out))
    assert found.keys() == truth.keys() - {"0005", "0007"}
    for key, tensors in found.items():
        for name, source in {"latent_mean": "mean", "latent_logvar": "logvar", "t5": "t5", "pooled": "clip"}.items():
            assert torch.equal(tensors[name], truth[key][source]), name


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_next_windows_shards_are_fetched_ahead(stage, tmp_path):
    with served(stage.encoded) as url:
        data = dataset(url, cache=CacheConfig(dir=tmp_path / "cache"), window=40, validation_share=0)
        batch = data.loader(0, 12, 0, 1, 1)
        read = {data.shards.locate(int(id))[0] for id in data.plan.batch(0).id}
        ahead = {shard for _, shard in data.plan.shards_of(data.plan.window_of(0) + 1)}
        assert ahead - read
        next(iter(batch))
        deadline = time.monotonic() + 20
        while not ahead <= fetched(tmp_path / "cache", data) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ahead <= fetched(tmp_path / "cache", data)


def fetched(cache: Path, data: LatentDataset) -> set[int]:
    names = {path.name.partition("-")[2] for path in cache.glob("[!.]*.tar")}
    return {shard for shard, index in enumerate(data.shards.indices) if index.name in names}


@pytest.mark.skipif(not (SHARED / "data" / "emoji").is_dir(), reason="shared data is not here")
def test_little_of_a_batch_of_real_captions_is_padding(tmp_path):
    """The emoji's captions, 3 to 29 tokens, in batches of 32: at most a tenth of the tokens is padding."""
    indices = index_shards(SHARED / "data" / "emoji", tmp_path)
    reader, tokenize = ShardReader(indices), tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    table = SimpleNamespace(counts=np.array([[len(index)] for index in indices]), weight=None, caption_weights=[1.0])
    starts = np.cumsum([0, *map(len, indices)])
    lengths = [
        np.array(
            [[len(tokenize.encode(reader.read(shard, row, "txt").decode().strip()).ids)] for row in range(len(index))]
        )
        for shard, index in enumerate(indices)
    ]
    table.rows = lambda shard: Rows(
        starts[shard] + np.arange(len(lengths[shard])), np.zeros(len(lengths[shard]), int), lengths[shard]
    )
    plan, all_lengths = BatchPlan([table], 32, seed=0), np.concatenate(lengths)[:, 0]
    batches = [all_lengths[plan.batch(n).id] for n in range(3 * 118)]
    padded = sum(len(batch) * batch.max() for batch in batches)
    assert 1 - sum(batch.sum() for batch in batches) / padded <= 0.10
