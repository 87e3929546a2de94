from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import UserError, dump, load, validate
from stack.data.buckets import BucketConfig, BucketRule, fit, histogram, unfilled
from stack.data.dataset import ImageData, ImageDataset, LatentData, LatentDataset
from stack.data.index import build_index
from stack.data.plan import BatchPlan, Rows
from stack.data.sources import find_shards

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos"

# Appendix I of arXiv 2307.01952, (height, width).
SDXL = """
512 2048  512 1984  512 1920  512 1856  576 1792  576 1728  576 1664  640 1600  640 1536  704 1472
704 1408  704 1344  768 1344  768 1280  832 1216  832 1152  896 1152  896 1088  960 1088  960 1024
1024 1024  1024 960  1088 960  1088 896  1152 896  1152 832  1216 832  1280 768  1344 768  1408 704
1472 704  1536 640  1600 640  1664 576  1728 576  1792 576  1856 512  1920 512  1984 512  2048 512
"""


def buckets_for(resolution: int) -> BucketRule:
    return BucketConfig(resolution=resolution).rule()


def by_distance(rule: BucketRule, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The definition of `assign`, with a matrix of all distances."""
    sides = np.array(rule.buckets, np.float64)
    ratio = np.log(width.astype(np.float64) / height)
    distance = np.round(np.abs(ratio[..., None] - np.log(sides[:, 0] / sides[:, 1])), 9)
    return distance.argmin(axis=-1)


RULES = {
    "sdxl": BucketConfig(resolution=1024, table="sdxl").rule(),
    "pixart-512": BucketConfig(resolution=512, table="pixart").rule(),
    "generated-1024": buckets_for(1024),
    "generated-256": buckets_for(256),
    "generated-32": buckets_for(32),
    "step-64": BucketConfig(resolution=1024, step=64, max_ratio=4).rule(),
}


# ---- generated buckets


def test_three_buckets_at_32() -> None:
    assert buckets_for(32).buckets == ((32, 32), (40, 24), (24, 40))


def test_nine_buckets_at_1024() -> None:
    wide = [(1088, 960), (1152, 896), (1216, 832), (1344, 768)]
    assert buckets_for(1024).buckets == ((1024, 1024), *(b for side in wide for b in (side, side[::-1])))


@given(st.integers(1, 160).map(lambda n: 8 * n))
def test_buckets_keep_area_ratio_and_multiples(resolution: int) -> None:
    rule = buckets_for(resolution)
    assert rule.buckets[0] == (resolution, resolution)
    for width, height in rule.buckets:
        assert width % 8 == height % 8 == 0
        assert width * height <= resolution**2
        assert 0.5 <= width / height <= 2
        assert (height, width) in rule.buckets


def test_larger_resolutions_have_more_buckets() -> None:
    assert [len(buckets_for(resolution).buckets) for resolution in (64, 256, 1024)] == [5, 9, 9]


@given(st.integers(1, 20), st.integers(1, 8).map(lambda n: 8 * n), st.floats(1, 6))
def test_steps_and_ratios_are_kept(units: int, step: int, max_ratio: float) -> None:
    rule = BucketConfig(resolution=units * step, step=step, max_ratio=max_ratio).rule()
    for width, height in rule.buckets:
        assert width % step == height % step == 0
        assert 1 / max_ratio <= width / height <= max_ratio
        assert width * height <= (units * step) ** 2
    longest = max(width for width, _ in rule.buckets)
    assert (units * step) ** 2 < longest * (min(height for _, height in rule.buckets) + step)  # none larger was left


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"resolution": 0}, "greater than 0"),
        ({"resolution": -8}, "greater than 0"),
        ({"resolution": 33}, "resolution 33 is not a multiple of 8"),
        ({"resolution": 1000, "step": 64}, "resolution 1000 is not a multiple of 64"),
        ({"resolution": 1000, "step": 20}, "step 20 is not a multiple of 8"),
        ({"resolution": 32, "max_ratio": 0.5}, "max_ratio: Input should be greater than or equal to 1"),
        ({"resolution": 512, "table": "sdxl"}, "table 'sdxl' is for a resolution of 1024, not 512"),
        ({"resolution": 768, "table": "pixart"}, "is for a resolution of 256, 512, 1024, 2048, not 768"),
        ({"resolution": 1024, "table": "sdxl", "step": 64}, "leave out step and max_ratio"),
        ({"resolution": 1024, "table": "sdxl", "max_ratio": 3}, "leave out step and max_ratio"),
        ({"resolution": 1024, "table": "sd3"}, "table: Input should be 'sdxl' or 'pixart'"),
        ({"table": "sdxl"}, "key 'resolution' is missing"),
    ],
)
def test_a_wrong_value_is_a_user_error(values: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        validate(BucketConfig, values, "x.yaml")


@pytest.mark.parametrize("values", [{"resolution": 48}, {"resolution": 1024, "table": "sdxl"}])
def test_a_saved_configuration_loads_again(values: dict[str, object], tmp_path: Path) -> None:
    config = validate(BucketConfig, values, "x.yaml")
    (tmp_path / "saved.yaml").write_text(dump(config))
    assert load(BucketConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("buckets", [[], [[32, 30]], [[0, 8]], [[-8, 8]], [[32, 32], [32, 32]], [[32]]])
def test_bad_buckets_are_user_errors(buckets: list[list[int]]) -> None:
    with pytest.raises(UserError):
        validate(BucketRule, {"buckets": buckets}, "x.yaml")


# ---- published tables


def test_the_table_of_sdxl() -> None:
    sides = [int(side) for side in SDXL.split()]
    published = list(zip(sides[1::2], sides[::2], strict=True))
    assert len(published) == 40
    assert list(RULES["sdxl"].buckets) == published


@pytest.mark.parametrize("resolution", [256, 512, 1024, 2048])
def test_the_tables_of_pixart_are_those_of_diffusers(resolution: int) -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as pixart

    published = getattr(pixart, f"ASPECT_RATIO_{resolution}_BIN")
    rule = BucketConfig(resolution=resolution, table="pixart").rule()
    assert list(rule.buckets) == [(int(width), int(height)) for height, width in published.values()]
    assert [f"{height / width:.2f}" for width, height in rule.buckets] == [f"{float(key):.2f}" for key in published]


# ---- assignment


def test_assign_takes_the_nearest_log_ratio() -> None:
    rule = buckets_for(32)
    assert rule.assign(100, 100) == 0
    assert rule.assign(1000, 100) == 1
    assert rule.assign(100, 1000) == 2
    width, height = np.array([[64, 200], [90, 1]]), np.array([[64, 100], [100, 9]])
    assert rule.assign(width, height).tolist() == [[0, 1], [0, 2]]
    # 1.25 is nearer to 1 than to 5/3 in the logarithm, 1.3 is not: √(5/3) = 1.291
    assert rule.assign(128, 100) == 0
    assert rule.assign(130, 100) == 1


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_assign_is_symmetric(width: int, height: int) -> None:
    rule = buckets_for(64)
    one, other = (rule.buckets[int(rule.assign(*sides))] for sides in ((width, height), (height, width)))
    assert one == other[::-1] or width == height


def test_a_tie_goes_to_the_first() -> None:
    assert BucketRule(buckets=((40, 24), (24, 40))).assign(7, 7) == 0
    assert BucketRule(buckets=((24, 40), (40, 24))).assign(7, 7) == 0
    assert BucketRule(buckets=((16, 16), (64, 16))).assign(2, 1) == 0
    assert BucketRule(buckets=((64, 16), (16, 16))).assign(2, 1) == 0


def test_of_equal_ratios_the_first_wins() -> None:
    rule = BucketRule(buckets=((64, 32), (48, 48), (16, 8), (32, 32), (32, 16)))
    assert rule.assign([2, 1, 5], [1, 1, 1]).tolist() == [0, 1, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*2 * [st.integers(1, 8).map(lambda n: 8 * n)]), min_size=1, max_size=12, unique=True))
def test_assign_is_what_all_distances_say_ties_included(buckets: list[tuple[int, int]]) -> None:
    """Small sides make many ties: equal ratios, and images of just the geometric mean of two."""
    rule = BucketRule(buckets=tuple(buckets))
    width, height = (axis.ravel() for axis in np.meshgrid(np.arange(1, 33), np.arange(1, 33)))
    assert np.array_equal(rule.assign(width, height), by_distance(rule, width, height))


@pytest.mark.parametrize("name", RULES)
def test_assign_is_what_all_distances_say_on_random_images(name: str) -> None:
    rule, rng = RULES[name], np.random.default_rng(0)
    width, height = rng.integers(1, 6000, (2, 20_000), dtype=np.int32)
    assigned = rule.assign(width, height)
    assert assigned.dtype == np.int64
    assert np.array_equal(assigned, by_distance(rule, width, height))


def test_a_million_images_take_little_memory() -> None:
    """A matrix of distances to 40 buckets alone would be 320 MB."""
    width, height = np.random.default_rng(0).integers(64, 4096, (2, 1_000_000), dtype=np.int32)
    tracemalloc.start()
    try:
        assigned = RULES["sdxl"].assign(width, height)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30e6
    assert np.array_equal(assigned[:1000], by_distance(RULES["sdxl"], width[:1000], height[:1000]))


# ---- what an image loses


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(buckets_for(64).buckets))
def test_fit_covers_and_centres(width: int, height: int, bucket: tuple[int, int]) -> None:
    (resized_width, resized_height), (left, top, right, bottom) = fit(width, height, bucket)
    assert (right - left, bottom - top) == bucket
    assert 0 <= left < right <= resized_width
    assert 0 <= top < bottom <= resized_height
    assert abs(left - (resized_width - right)) <= 1
    assert abs(top - (resized_height - bottom)) <= 1
    assert resized_width == bucket[0] or resized_height == bucket[1]  # no larger than it must be
    scale = max(bucket[0] / width, bucket[1] / height)
    assert abs(resized_width - width * scale) <= 1
    assert abs(resized_height - height * scale) <= 1


def worst_loss(rule: BucketRule, max_ratio: float) -> float:
    """Largest share of its area that an image of a ratio in 1/max_ratio … max_ratio loses in its bucket.

    An image of ratio r in a bucket of ratio b keeps min(r/b, b/r). The worst r is in the middle between two buckets'
    logarithms, or at an end.
    """
    ratios, end = np.log(sorted(width / height for width, height in rule.buckets)), math.log(max_ratio)
    middles = (ratios[:-1] + ratios[1:]) / 2
    candidates = np.array([-end, *middles[np.abs(middles) < end], end])
    return 1 - math.exp(-np.abs(candidates[:, None] - ratios).min(axis=1).max())


def loss(width: int, height: int, bucket: tuple[int, int]) -> float:
    (resized_width, resized_height), _ = fit(width, height, bucket)
    return 1 - bucket[0] * bucket[1] / (resized_width * resized_height)


LOSSES = {"sdxl": 0.0646, "pixart-512": 0.0646, "generated-1024": 0.125, "generated-256": 0.125, "step-64": 0.0862}
LOSSES["generated-32"] = 0.2255


@pytest.mark.parametrize(("name", "most"), LOSSES.items())
@settings(max_examples=50, deadline=None)
@given(st.integers(32, 6000), st.floats(0.5, 2))
def test_no_image_within_two_to_one_loses_more(name: str, most: float, width: int, ratio: float) -> None:
    rule, height = RULES[name], math.ceil(width / ratio)
    assert worst_loss(rule, 2) == pytest.approx(most, abs=1e-4)
    if 0.5 <= width / height <= 2:
        bucket = rule.buckets[int(rule.assign(width, height))]
        assert loss(width, height, bucket) <= worst_loss(rule, 2) + 0.5 / min(bucket)  # resized to whole pixels


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="shared data is not here")
@pytest.mark.parametrize(("name", "most"), LOSSES.items())
def test_photos_stand_in_their_nearest_bucket_and_lose_little(name: str, most: float) -> None:
    rule, indices = RULES[name], [build_index(path) for path in find_shards(PHOTOS)]
    width, height = (np.concatenate([getattr(index, side) for index in indices]) for side in ("width", "height"))
    assert len(width) == 384
    assert 0.5 <= (width / height).min() < 0.55
    assert 1.9 < (width / height).max() <= 2
    for w, h, assigned in zip(width.tolist(), height.tolist(), rule.assign(width, height).tolist(), strict=True):
        distances = [abs(math.log(w / h) - math.log(a / b)) for a, b in rule.buckets]
        assert distances[assigned] == pytest.approx(min(distances), abs=1e-12)
        bucket = rule.buckets[assigned]
        assert loss(w, h, bucket) <= most + 0.5 / min(bucket)


# ---- counts


def test_histogram() -> None:
    counts = [12_345, 0, 800, 1, 0, 0, 0, 22_954, 0]
    assert histogram(counts, buckets_for(1024)).splitlines() == [
        " 1344×768  ratio 1.75  22,954   63.6 %  ████████████████████████████████████████",
        "1024×1024  ratio 1.00  12,345   34.2 %  ██████████████████████",
        " 960×1088  ratio 0.88     800    2.2 %  █",
        " 1152×896  ratio 1.29       1    0.0 %  █",
    ]
    assert histogram([0, 7, 7], buckets_for(32)).splitlines() == [
        "40×24  ratio 1.67  7   50.0 %  " + 40 * "█",
        "24×40  ratio 0.60  7   50.0 %  " + 40 * "█",
    ]
    assert histogram([0, 0, 0], buckets_for(32)) == ""


def test_unfilled_names_buckets_with_less_than_a_batch() -> None:
    rule = buckets_for(32)
    assert unfilled([64, 0, 5_000], 64, rule) == []
    assert unfilled([64, 5, 63], 64, rule) == [
        "bucket 40×24 has 5 of the 64 samples that make a batch: it is drawn once every 12.8 epochs, with the samples "
        "of all of them; the first batch is expected in epoch 13, counted from 1",
        "bucket 24×40 has 63 of the 64 samples that make a batch: it is drawn once every 1.0 epochs, with the samples "
        "of all of them; the first batch is expected in epoch 2, counted from 1",
    ]


@pytest.mark.parametrize("count", [1, 5, 8, 16, 31])
def test_the_first_batch_of_an_unfilled_bucket_comes_when_said(count: int) -> None:
    rows = Rows(np.arange(40 + count), np.repeat([0, 1], [40, count]), np.zeros((40 + count, 1), np.int64))
    table = SimpleNamespace(counts=np.array([[40, count]]), weight=None, caption_weights=[1.0], rows=lambda _: rows)
    plan = BatchPlan([table], 32, seed=0)
    first = next(n for n in range(200) if plan.batch(n).id[0] >= 40)
    (line,) = unfilled([40, count, 0], 32, buckets_for(32))
    assert f"expected in epoch {plan.epoch_of(first) + 1}," in line


def test_a_bucket_is_unfilled_by_what_a_mixture_takes_of_it(tmp_path, pack, picture) -> None:
    for name, size in (("a", (32, 32)), ("b", (40, 24))):
        image = picture(1, size=size)
        pack(tmp_path / name / f"{name}.tar", [(f"{name}{row}.png", image) for row in range(100)])
    config = ImageData(source={str(tmp_path / "a"): 0.01, str(tmp_path / "b"): 0.99}, batch_size=64, max_validation=0)
    data = ImageDataset(config, seed=0)
    assert data.plan.quotas == [2, 198]
    assert data.unfilled() == unfilled([2, 198, 0], 64, config.buckets.rule()) != []
    n = next(n for n in range(200) if data.plan.batch(n).id[0] < 100)
    assert data.plan.epoch_of(n) == 31
    assert "once every 32.0 epochs" in data.unfilled()[0]
    assert "expected in epoch 32," in data.unfilled()[0]


def test_training_says_which_buckets_have_less_than_a_batch(stage, mmdit, tmp_path) -> None:
    latents = LatentDataset(LatentData(path=str(stage.encoded), batch_size=64, max_validation=0), seed=0)
    images = ImageDataset(ImageData(source=str(stage.shards), batch_size=64, max_validation=0), seed=0)
    counts = np.bincount([latents._bucket(sample) for sample in range(96)], minlength=3).tolist()
    sides = BucketRule(buckets=tuple(latents.sides))
    assert images.num_samples == 96
    assert latents.unfilled() == unfilled(counts, 64, sides) != []
    assert sorted(latents.unfilled()) == sorted(images.unfilled())
    keys = {"path": str(stage.encoded), "batch_size": 64, "max_validation": 0}
    config = stage.train_config("unfilled", run={"dir": str(tmp_path)}, data=keys, schedule={"steps": 1})
    said = mmdit("train", config).stderr
    assert "\n".join(latents.unfilled()) in said.partition("step/s")[0]  # before the first step
    data = LatentDataset(LatentData(path=str(stage.encoded), batch_size=8, max_validation=0), seed=0)
    assert data.unfilled() == []
