from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.config import UserError, validate
from stack.data.buckets import BucketRule, buckets_for, fit


def test_three_buckets_at_32() -> None:
    assert buckets_for(32).buckets == ((32, 32), (40, 24), (24, 40))


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
    assert all(side % 16 == 0 for bucket in buckets_for(128, multiple=16).buckets for side in bucket)


@pytest.mark.parametrize("resolution", [0, -8, 33])
def test_a_resolution_off_the_grid_is_a_user_error(resolution: int) -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        buckets_for(resolution)


@pytest.mark.parametrize("buckets", [[], [[32, 30]], [[0, 8]], [[-8, 8]], [[32, 32], [32, 32]], [[32]]])
def test_bad_buckets_are_user_errors(buckets: list[list[int]]) -> None:
    with pytest.raises(UserError):
        validate(BucketRule, {"buckets": buckets}, "x.yaml")


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
