"""Labels, grey images and second images of raw shards, and scikit-learn's digits as such shards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from stack.config import UserError
from stack.data.dataset import ImageData, ImageDataset
from stack.data.digits import write_shards
from stack.data.safety import RejectLog


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "digits"
    assert write_shards(out) == 1797
    return out


@pytest.fixture
def shards(tmp_path, pack, sample):
    """A folder of one shard whose samples, k0 …, have these values under "label"."""

    def write(labels: list[Any], name: str = "a", key: str = "k") -> str:
        members = []
        for number, label in enumerate(labels):
            image, text, _ = sample(f"{key}{number}", number)
            facts = {} if label is None else {"label": label}
            members += [image, text, (f"{key}{number}.json", json.dumps(facts).encode())]
        pack(tmp_path / name / "00000.tar", members)
        return str(tmp_path / name)

    return write


def dataset(source: object, rejected: RejectLog | None = None, num_classes: int | None = None, **keys: Any):
    keys = {"label": "label", "batch_size": 4, "validation_share": 0, **keys}
    return ImageDataset(ImageData(source=str(source), **keys), 0, rejected, num_classes)


def first(data: ImageDataset):
    (batch,) = data.loader(0, 1, 0, 1, 1)
    return batch


def test_every_digit_has_its_pixels_and_its_label(digits):
    truth = load_digits()
    data = dataset(digits, buckets={"resolution": 8}, channels=1, batch_size=1797)
    batch = first(data)
    numbers = [int(key) for key in batch.keys]
    assert sorted(numbers) == list(range(1797))
    assert batch.label_B.tolist() == truth.target[numbers].tolist()
    assert batch.image_BCHW.shape == (1797, 1, 8, 8)
    levels = (batch.image_BCHW[:, 0].double() + 1) / 2 * 16
    assert np.abs(levels.numpy() - truth.images[numbers]).max() < 16 * 0.5 / 255 + 1e-6
    assert len(batch.image_BCHW.unique()) == 17


def test_digits_do_not_mix_with_what_is_there_already(digits, tmp_path):
    before = (digits / "00000.tar").read_bytes()
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(digits)
    write_shards(tmp_path / "again")
    assert (tmp_path / "again" / "00000.tar").read_bytes() == before


def test_grey_is_pillows_luma_of_the_colours(shards):
    source = shards([0, 1, 2, 3])
    grey, colour = (first(dataset(source, channels=channels)) for channels in (1, 3))
    assert grey.keys == colour.keys
    assert (grey.image_BCHW.shape[1], colour.image_BCHW.shape[1]) == (1, 3)
    luma = torch.tensor([0.299, 0.587, 0.114])
    for one, other in zip(grey.image_BCHW, colour.image_BCHW, strict=True):
        assert torch.allclose(one[0], torch.einsum("chw,c->hw", other, luma), atol=1.01 / 127.5)


def test_without_the_key_no_label_is_read(shards):
    assert first(dataset(shards([None, "x", -1, 2]), label=None)).label_B is None


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "no label: KEY.json has no 'label'"),
        (-1, "bad label: label is -1, expected an integer from 0"),
        ("3", 'bad label: label is "3", expected an integer from 0'),
        (True, "bad label: label is true, expected an integer from 0"),
        (1.0, "bad label: label is 1.0, expected an integer from 0"),
    ],
)
def test_a_sample_without_a_good_label_is_left_out_and_counted(shards, tmp_path, listed, label, reason):
    source, log = shards([0, 1, label, 3]), RejectLog(tmp_path / "rejected.jsonl")
    batch = first(dataset(source, log, max_rejected=0.3))
    assert "k2" not in batch.keys
    assert listed(log.path) == {"k2": reason}
    with pytest.raises(UserError, match=r"1 of 4 samples are broken \(1 × (no|bad) label\)"):
        first(dataset(source, max_rejected=0.2))


def test_a_label_beyond_the_classes_is_named(shards):
    source = shards([0, 1, 2, 3])
    with pytest.raises(UserError, match=r"k3 has label 3, and objective\.classes=3 ends with 2"):
        first(dataset(source, num_classes=3))
    assert first(dataset(source, num_classes=4)).label_B.max() == 3


def test_labels_asked_for_where_the_data_have_none(tmp_path, pack, sample):
    pack(tmp_path / "00000.tar", [member for i in range(4) for member in sample(f"k{i}", i)[:2]])
    with pytest.raises(UserError, match=r"data\.label=label: .* has no KEY\.json"):
        dataset(tmp_path)


def test_a_pair_is_of_one_key_whatever_the_order_and_the_shards(tmp_path, pack, picture, sample):
    numbers = list(range(8))
    pack(tmp_path / "a" / "00000.tar", [member for i in numbers for member in sample(f"k{i}", i)])
    for shard, own in enumerate(([5, 1, 7], [0, 6, 2, 4, 3])):
        pack(tmp_path / "b" / f"{shard:05d}.tar", [(f"k{i}.png", picture(15 - i)) for i in own])
    batch = first(dataset(tmp_path / "a", label=None, paired=str(tmp_path / "b"), batch_size=8))
    assert sorted(batch.keys) == [f"k{i}" for i in numbers]
    for key, image, paired in zip(batch.keys, batch.image_BCHW, batch.paired_BCHW, strict=True):
        number = int(key[1:])
        assert [round(float(x[0].mean() + 1) * 127.5) for x in (image, paired)] == [16 * number, 16 * (15 - number)]


def test_a_sample_without_its_second_image_is_left_out(tmp_path, shards, listed):
    source, paired = shards([0, 1, 2, 3]), shards([0, 1, 2], "b")
    log = RejectLog(tmp_path / "rejected.jsonl")
    batch = first(dataset(source, log, label=None, paired=paired, max_rejected=0.3))
    assert "k3" not in batch.keys
    assert listed(log.path) == {"k3": "no partner: data.paired has no sample of this key"}


def test_labels_come_through_the_workers_and_to_the_device(shards):
    data = dataset(shards([3, 1, 4, 1, 5, 9]), workers=1, batch_size=6)
    batch = first(data).to(torch.device("meta"))
    assert batch.label_B.shape == (6,)
    assert batch.label_B.device.type == "meta"
    assert batch.paired_BCHW is None


def test_a_grey_picture_in_a_shard_stays_what_it_is(tmp_path, pack):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "png")
    pack(tmp_path / "00000.tar", [("k.png", stream.getvalue()), ("k.txt", b"ramp")])
    data = dataset(tmp_path, label=None, channels=1, batch_size=1, buckets={"resolution": 8})
    assert ((first(data).image_BCHW[0, 0] + 1) * 127.5).round().numpy().astype(np.uint8).tolist() == values.tolist()
