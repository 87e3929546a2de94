"""Resolution buckets: a batch holds images of one (width, height) only, near each image's own aspect ratio."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from stack.config import Config, UserError

SIDE_MULTIPLE = 8  # of every side, in pixels: a latent of an 8× autoencoder, or a 4× one in patches of 2


class BucketRule(Config):
    """The buckets of a data set, (width, height) in pixels."""

    buckets: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]

    @field_validator("buckets")
    @classmethod
    def _check(cls, buckets: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for width, height in buckets:
            if min(width, height) <= 0 or width % SIDE_MULTIPLE or height % SIDE_MULTIPLE:
                raise ValueError(f"bucket {width}×{height}: sides must be positive multiples of {SIDE_MULTIPLE}")
        if len(set(buckets)) < len(buckets):
            raise ValueError("a bucket stands twice")
        return buckets

    def assign(self, width: npt.ArrayLike, height: npt.ArrayLike) -> np.ndarray:
        """Index of the bucket with the nearest logarithm of width / height; the first of equals.

        Takes numbers or arrays of one shape, returns int64 of that shape.
        """
        ratio = np.log(np.asarray(width, np.float64) / np.asarray(height, np.float64))
        sides = np.array(self.buckets, np.float64)
        # Rounded, so that a tie (a square between tall and wide) does not hang on the last bit of a logarithm.
        distance = np.round(np.abs(ratio[..., None] - np.log(sides[:, 0] / sides[:, 1])), 9)
        return distance.argmin(axis=-1)


def buckets_for(resolution: int, max_ratio: float = 2.0, multiple: int = SIDE_MULTIPLE) -> BucketRule:
    """Square, wide and tall buckets of at most resolution² pixels, the squarest first.

    The shorter side goes down from `resolution` in steps of about a sixteenth (at least `multiple`), the longer is as
    long as the area allows, up to `max_ratio`: 32×32, 40×24, 24×40 at 32; nine buckets at 1024.
    """
    if resolution <= 0 or resolution % multiple:
        raise UserError(f"resolution {resolution} is not a positive multiple of {multiple}")
    step = max(multiple, resolution // 16 // multiple * multiple)
    buckets = [(resolution, resolution)]
    for short in range(resolution - step, 0, -step):
        long = resolution**2 // short // step * step
        if long > max_ratio * short:
            break
        buckets += [(long, short), (short, long)]
    return BucketRule(buckets=tuple(buckets))


def fit(width: int, height: int, bucket: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How an image of width × height comes into `bucket`: ((width, height) to resize to, (left, top, right, bottom)).

    The image is scaled until it just covers the bucket, then cropped around its centre.
    """
    bucket_width, bucket_height = bucket
    scale = max(bucket_width / width, bucket_height / height)
    resized = max(bucket_width, round(width * scale)), max(bucket_height, round(height * scale))
    left, top = (resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2
    return resized, (left, top, left + bucket_width, top + bucket_height)
