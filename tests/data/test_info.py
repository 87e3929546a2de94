"""`mmdit data info`: the figures are those that one counts by hand, from indices alone."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stack.config import UserError
from stack.data import mlperf
from stack.data.buckets import BucketConfig
from stack.data.info import _even, _quantile, describe, render
from stack.data.schema import load_manifest
from stack.data.shards import index_shards

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def _shard(path: Path, samples: list[tuple[tuple[int, int], str]]) -> Path:
    """A shard of black images of these sizes with these captions."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (size, caption) in enumerate(samples):
            stream = io.BytesIO()
            Image.new("RGB", size).save(stream, "PNG")
            for extension, data in (("png", stream.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{path.stem}-{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_raw_shards(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", [((64, 64), "a cat"), ((200, 100), "two cats"), ((100, 201), "")])
    _shard(tmp_path / "1.tar", [((300, 200), "x" * 500)])
    facts = describe(tmp_path, rule=BucketConfig(resolution=64, step=16).rule())
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert {name: facts[name] for name in ("shards", "samples", "bytes", "rejected", "bad_captions", "damaged")} == {
        "shards": 2,
        "samples": 4,
        "bytes": size,
        "rejected": {},
        "bad_captions": {"empty caption": 1},
        "damaged": {},
    }
    assert facts["bytes_per_sample"] == size / 4
    assert facts["samples_per_shard"] == {"min": 1, "median": 1, "mean": 2, "max": 3}
    assert facts["width"] == {"min": 64, "median": 100, "mean": 166, "max": 300}
    assert facts["height"]["median"] == 100
    assert facts["shorter_side"] == [[64, 127, 3], [128, 255, 1]]
    assert {name: count for name, count in facts["aspect_ratios"] if count} == {"1:2": 1, "1:1": 1, "3:2": 1, "2:1": 1}
    assert facts["caption_unit"] == "characters"
    assert (facts["captions"]["txt"]["samples"], facts["captions"]["txt"]["absent"]) == (3, 1)
    assert facts["captions"]["txt"]["median"] == 8
    assert {(w, h): n for w, h, n in facts["buckets"] if n} == {(64, 64): 1, (80, 48): 2, (48, 80): 1}
    assert facts["members"]["txt"] == {"samples": 4, "mean_bytes": 513 / 4}
    assert json.loads(json.dumps(facts)) == facts

    for shard in tmp_path.glob("*.tar"):  # indices tell it all: no shard is opened
        before = shard.stat()
        shard.write_bytes(bytes(before.st_size))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert describe(tmp_path, rule=BucketConfig(resolution=64, step=16).rule()) == facts

    text = render(facts)
    assert f"{tmp_path}: 4 raw samples in 2 shards" in text
    assert "caption not usable: 1 × empty caption" in text
    assert "80×48  ratio 1.67  2   50.0 %" in text
    assert "caption txt: 5 – 8 – 500 (smallest, median, largest) characters" in text


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data is not here")
def test_real_shards_against_their_columns(tmp_path: Path) -> None:
    rule = BucketConfig(resolution=256).rule()
    facts = describe(DATA / "photos", tmp_path, rule=rule)
    indices = index_shards(DATA / "photos", tmp_path)
    width, height = (np.concatenate([getattr(index, name) for index in indices]) for name in ("width", "height"))
    lengths = np.concatenate([index.caption_length[:, 0] for index in indices])
    for name, column in (("width", width), ("height", height)):
        assert facts[name]["median"] == np.sort(column)[len(column) // 2 - 1]
        assert facts[name]["mean"] == pytest.approx(column.mean())
    assert [count for *_, count in facts["buckets"]] == np.bincount(rule.assign(width, height), minlength=9).tolist()
    for first, last, count in facts["shorter_side"]:
        assert count == ((np.minimum(width, height) >= first) & (np.minimum(width, height) <= last)).sum()
    for first, last, count in facts["captions"]["txt"]["histogram"]:
        assert count == ((lengths >= first) & (lengths <= (last or 10**9))).sum()
    assert sum(count for _, count in facts["aspect_ratios"]) == 384


def test_pre_encoded_shards(stage) -> None:
    facts = describe(stage.encoded)
    manifest = load_manifest(stage.encoded)
    assert facts["caption_unit"] == "tokens"
    assert [count for *_, count in facts["buckets"]] == [
        sum(((index.width * 4 == w) & (index.height * 4 == h)).sum() for index in index_shards(stage.encoded))
        for w, h in manifest.buckets
    ]
    assert sum(count for *_, count in facts["buckets"]) == facts["samples"] == 96
    told = facts["manifest"]
    assert told["encoders"] == {name: digest[:12] for name, digest in manifest.encoders.items()}
    assert (told["scale"], told["latent_mean"], told["captions"]) == (manifest.scale, manifest.latent_mean, ["txt"])
    assert json.loads(json.dumps(facts)) == facts
    text = render(facts)
    assert f"encoders: autoencoder {manifest.encoders['autoencoder'][:12]}, t5 " in text
    assert "latent: 4 channels at 1/4 of the side" in text
    assert "32×32  ratio 1.00  64" in text
    with pytest.raises(UserError, match="name none"):
        describe(stage.encoded, rule=BucketConfig(resolution=32).rule())
    with pytest.raises(UserError, match="one pre-encoded folder at a time"):
        describe(f"{stage.folder}/{{shards,encoded}}/00000.tar")


def test_captions_that_samples_lack(stage, tmp_path: Path, mmdit: Callable) -> None:
    settings = ("captions.txt=txt", "captions.none=json.nothing")
    assert mmdit("preencode", stage.folder / "preencode.yaml", f"out={tmp_path}/out", *settings).returncode == 0
    facts = describe(tmp_path / "out")["captions"]
    assert (facts["txt"]["samples"], facts["txt"]["absent"]) == (96, 0)
    assert facts["none"] == {"samples": 0, "absent": 96, "histogram": []}
    assert "caption none: none" in render(describe(tmp_path / "out"))


def test_mlperf_s_layout_in_all_tools(stage, tmp_path: Path, mmdit: Callable, pack: Callable, monkeypatch) -> None:
    """Samples that came encoded, at the widths of the small encoders: without an image, two of them without a text."""
    for name, value in {"CHANNELS": 4, "TOKENS": 16, "T5_DIM": 128, "CLIP_DIM": 48, "FACTOR": 4}.items():
        monkeypatch.setattr(mlperf, name, value)
    draws = np.random.default_rng(0)

    def sample(key: str, facts: dict[str, str]) -> list[tuple[str, bytes]]:
        sizes = {"mean.bytes": 256, "logvar.bytes": 256, "t5.bytes": 16 * 128, "clip.bytes": 48}
        # Words of bfloat16 from 2⁻³ to 2⁰, of both signs.
        words = {
            name: draws.integers(0x3E00, 0x3F80, size) | draws.choice([0, 0x8000], size) for name, size in sizes.items()
        }
        members = {name: values.astype("<u2").tobytes() for name, values in words.items()}
        return [
            (f"{key}.json", json.dumps(facts).encode()),
            *((f"{key}.{name}", data) for name, data in members.items()),
        ]

    raw, out = tmp_path / "raw", tmp_path / "out"
    pack(raw / "00000.tar", [m for n in range(6) for m in sample(f"{n}", {"caption": "a cat"} if n % 3 else {})])
    settings = (f"source={raw}", f"out={out}", "text.pad=full", "text.clip_tokens=false", "text.t5_max_tokens=16")
    settings = (*settings, "text.clip_g=null", "text.clip_projection=false")
    command = ("preencode", stage.folder / "preencode.yaml", *settings)
    assert mmdit(*command).returncode == 0
    for folder in (raw, out):
        assert mmdit("data", "lint", folder).stdout.startswith("no problem in 6 samples")
        facts = describe(folder)
        assert (facts["caption_unit"], facts["captions"]["txt"]["max"]) == ("tokens", 16)
    done = mmdit(*command, "--verify", 6)
    assert done.stdout.splitlines()[-1] == f"{out}: 6 samples encoded again, all agree"
    page = tmp_path / "page.html"
    assert mmdit("data", "preview", raw, "--resolution", 32, "-o", page).returncode == 0
    assert page.read_text().count("there is no image") == 6
    done = mmdit("data", "preview", out, "--autoencoder", stage.codec, "--source", raw, "-o", page)
    assert done.returncode == 0, done.stderr
    assert page.read_text().count("decoded latent<") == 6
    assert page.read_text().count("a cat<") == 4

    broken = sample("7", {})
    broken[3] = (broken[3][0], b"\x80\x7f" + broken[3][1][2:])
    broken[2] = (broken[2][0], b"\x48\x44" + broken[2][1][2:])
    pack(raw / "00001.tar", broken)
    done = mmdit("data", "lint", raw)
    assert done.stdout.splitlines()[:2] == [
        f"{raw}/00001.tar: 7: non-finite: .t5.bytes has 1 of 2,048 values",
        f"{raw}/00001.tar: 7: variance too large: .logvar.bytes has e^800",
    ]


def test_shards_without_samples(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", [])
    facts = describe(tmp_path, rule=BucketConfig(resolution=64).rule())
    assert (facts["samples"], facts["width"], facts["captions"]["txt"]["samples"]) == (0, {}, 0)
    assert "0 raw samples in 1 shards" in render(facts)


@given(st.dictionaries(st.integers(0, 100_000), st.integers(1, 1000), min_size=1))
def test_histograms_count_each_sample_once(counts: dict[int, int]) -> None:
    counter = Counter(counts)
    bins = _even(counter)
    assert sum(count for *_, count in bins) == counter.total()
    assert len(bins) <= 13
    for (_, last, _), (first, _, _) in itertools.pairwise(bins):
        assert first == last + 1
    values = np.repeat(list(counts), list(counts.values()))
    assert _quantile(counter, 0.5) == np.sort(values)[(len(values) - 1) // 2]


def test_the_command(tmp_path: Path, mmdit: Callable) -> None:
    _shard(tmp_path / "0.tar", [((64, 64), "a cat"), ((200, 100), "two cats")])
    done = mmdit("data", "info", tmp_path, "--resolution", 64, "--json")
    assert done.returncode == 0, done.stderr
    rule = BucketConfig(resolution=64).rule()
    assert json.loads(done.stdout) == describe(tmp_path, rule=rule)
    assert mmdit("data", "info", tmp_path, "--resolution", 64).stdout == render(describe(tmp_path, rule=rule)) + "\n"
    for options, says in [
        (("--table", "sdxl"), "need --resolution"),
        (("--table", "sdxl", "--resolution", 512), "table 'sdxl' is for a resolution of 1024, not 512"),
        (("--resolution", 50), "resolution 50 is not a multiple of 8"),
    ]:
        done = mmdit("data", "info", tmp_path, *options)
        assert done.returncode == 2
        assert says in done.stderr
