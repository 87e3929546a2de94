"""`mmdit data preview`: what it shows is what training gets, and nothing in a caption becomes markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders.codec import Codec
from stack.data.buckets import BucketConfig, fit
from stack.data.images import decode_image, to_bucket
from stack.data.preview import choose, encoded_cards, raw_cards
from stack.data.remote import CacheConfig, ShardCache
from stack.data.schema import load_manifest
from stack.data.shards import ShardReader, ShardSet, index_shards

CACHE = ShardCache(CacheConfig())
CAPTION = "<script>alert('&')</script> \u202eright to left"


def _write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _png(width: int, height: int) -> bytes:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    stream = io.BytesIO()
    Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_samples_are_chosen_by_the_seed_alone() -> None:
    assert choose(1000, 5, 0) == [325, 542, 596, 737, 909]
    assert choose(1000, 5, 1) == [55, 278, 483, 538, 583]
    assert choose(7, 24, 3) == list(range(7))
    assert len(set(choose(50, 49, 1))) == 49


def test_raw_samples_as_they_are_trained_on(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", {"x.png": _png(600, 900), "x.txt": CAPTION.encode()})
    rule = BucketConfig(resolution=64).rule()
    shards = ShardSet(index_shards(tmp_path))
    (card,) = raw_cards(shards, CACHE, rule, [0])
    original, trained = card.pictures
    image = decode_image(_png(600, 900))
    bucket = rule.buckets[int(rule.assign(600, 900))]
    assert np.array_equal(_pixels(trained.url), to_bucket(image, bucket))
    assert (original.width, original.height) == (600, 900)
    assert _pixels(original.url).shape == (480, 320, 3)
    # The frame, on the original, is what the crop is cut from.
    (width, height), (left, top, right, bottom) = fit(600, 900, bucket)
    expected = [100 * left / width, 100 * top / height, 100 * (right - left) / width, 100 * (bottom - top) / height]
    assert original.frame == pytest.approx(expected)
    assert card.facts["bucket"] == f"{bucket[0]}×{bucket[1]}"
    assert card.facts["crop"] == f"left {left}, top {top}"
    assert [(c.text, c.length) for c in card.captions] == [(CAPTION, f"{len(CAPTION)} characters")]


def test_the_page_is_self_contained_and_escaped(tmp_path: Path, mmdit: Callable) -> None:
    members = {"x.png": _png(60, 90), "x.txt": CAPTION.encode()}
    members |= {"\udcff<b>.png": _png(50, 50), "\udcff<b>.txt": b"a key that is not UTF-8"}
    members |= {"cut.png": _png(50, 50)[:-40], "cut.txt": b"broken"}
    _write(tmp_path / "<i>.tar", members)
    command = ("data", "preview", tmp_path, "--resolution", 32, "--count", 9, "-o")
    for name in ("one.html", "two.html"):
        done = mmdit(*command, tmp_path / "out" / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}/out/{name}: 3 samples\n"
    page = (tmp_path / "out" / "one.html").read_text()
    assert page == (tmp_path / "out" / "two.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.html", "two.html"]
    assert CAPTION in unescape(page)
    assert not re.search(r"<(script|b|i)\b", page)
    assert not re.search(r"""(src|href)="(?!data:)""", page)
    assert "http" not in page
    assert "\\udcff&lt;b&gt;" in page
    assert "image not decodable" in page
    assert len(re.findall("<article>", page)) == 3


def test_pre_encoded_samples_as_they_are_trained_on(stage) -> None:
    """The decoded mean beside the original after its crop, of the same key."""
    shards, source = (ShardSet(index_shards(folder)) for folder in (stage.encoded, stage.shards))
    manifest, codec = load_manifest(stage.encoded), Codec.load(str(stage.codec))
    ids = [3, 50, 95]
    for sample, card in zip(ids, encoded_cards(shards, CACHE, manifest, codec, source, ids), strict=True):
        shard, row = source.locate(sample)
        reader = ShardReader(source.indices)
        trained, decoded = card.pictures
        bucket = (trained.width, trained.height)
        assert card.key == source.key(sample) == shards.key(sample)
        assert card.facts["bucket"] == f"{bucket[0]}×{bucket[1]}"
        pixels = to_bucket(decode_image(reader.read(shard, row, "png")), bucket)
        assert np.array_equal(_pixels(trained.url), pixels)
        with torch.inference_mode():
            image_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            again = codec.decode_raw(codec.encode(image_BCHW).mean_BCHW)[0].clamp(-1, 1)
        expected = ((again.permute(1, 2, 0) + 1) * 127.5).numpy()
        assert np.abs(_pixels(decoded.url) - expected).max() < 6  # of 255: the latent stands in bfloat16
        (caption,) = card.captions
        assert caption.text == reader.read(shard, row, "txt").decode()
        assert caption.length.startswith(f"{shards.indices[shard].caption_length[row, 0]} tokens")


def test_originals_are_joined_by_key_within_the_shard_of_the_same_name(stage, tmp_path: Path, mmdit: Callable) -> None:
    with tarfile.open(stage.shards / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    gone = "000000003"
    kept = {name: data for name, data in reversed(members.items()) if not name.startswith(gone)}
    _write(tmp_path / "raw" / "00000.tar", kept)
    source = ShardSet(index_shards(tmp_path / "raw"))
    shards = ShardSet(index_shards(stage.encoded / "00000.tar"))
    manifest, codec = load_manifest(stage.encoded), Codec.load(str(stage.codec))
    cards = {card.key: card for card in encoded_cards(shards, CACHE, manifest, codec, source, range(5))}
    assert cards[gone].problem == f"not in {tmp_path}/raw/00000.tar"
    assert [picture.title for picture in cards[gone].pictures] == ["decoded latent"]
    image = decode_image(members["000000004.png"])
    assert np.array_equal(_pixels(cards["000000004"].pictures[0].url), to_bucket(image, image.size))

    command = ("data", "preview", stage.encoded, "--autoencoder", stage.codec, "-o", tmp_path / "p.html")
    done = mmdit(*command, "--count", 96, "--source", tmp_path / "raw")
    assert done.returncode == 2
    assert "no shard 00001.tar there" in done.stderr
    assert mmdit(*command, "--source", stage.shards).returncode == 0
    assert "other shards" not in (tmp_path / "p.html").read_text()
    shutil.copytree(stage.shards, tmp_path / "more")
    _write(tmp_path / "more" / "00009.tar", {"x.png": _png(60, 90), "x.txt": b"x"})
    assert mmdit(*command, "--source", tmp_path / "more").returncode == 0
    assert "other shards than the manifest&#39;s source" in (tmp_path / "p.html").read_text()


def test_several_captions_each_with_its_length(stage, tmp_path: Path, mmdit: Callable) -> None:
    settings = ("captions.txt=txt", "captions.key=json.key", "captions.none=json.nothing")
    assert mmdit("preencode", stage.folder / "preencode.yaml", f"out={tmp_path}/out", *settings).returncode == 0
    shards = ShardSet(index_shards(tmp_path / "out"))
    manifest, codec = load_manifest(tmp_path / "out"), Codec.load(str(stage.codec))
    (card,) = encoded_cards(shards, CACHE, manifest, codec, None, [7])
    assert [(caption.name, caption.text) for caption in card.captions][1:] == [("key", "000000007")]
    assert [picture.title for picture in card.pictures] == ["decoded latent"]


def test_what_does_not_fit_is_refused(stage, tmp_path: Path, mmdit: Callable) -> None:
    out = ("-o", tmp_path / "p.html")
    other = tmp_path / "codec"
    shutil.copytree(stage.codec, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    made_by = load_manifest(stage.encoded).encoders["autoencoder"]
    for arguments, says in [
        ((stage.shards,), "raw shards need --resolution"),
        ((stage.shards, "--resolution", 32, "--source", stage.shards), "raw shards take neither"),
        ((stage.encoded,), "pre-encoded shards need --autoencoder"),
        ((stage.encoded, "--resolution", 32), "leave out --resolution"),
        ((stage.encoded, "--autoencoder", other), made_by),
        ((_write(tmp_path / "empty.tar", {}), "--resolution", 32), "not one usable sample"),
    ]:
        done = mmdit("data", "preview", *arguments, *out)
        assert done.returncode == 2, arguments
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "p.html").exists()
