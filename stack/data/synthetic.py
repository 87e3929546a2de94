"""Drawn scenes: one or two coloured shapes on a plain ground, with captions and the truth about each.

Everything of sample `index` is a function of (seed, index) alone. The combinations of colour, shape and position in
`HELD_OUT` never stand in a training scene, so a model that draws them has composed what it knows of the three.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from PIL import Image, ImageDraw

from stack.config import Config, Seed, UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (30, 160, 50),
    "blue": (35, 60, 230),
    "yellow": (250, 210, 30),
    "purple": (190, 40, 215),
    "cyan": (40, 205, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (15, 15, 15),
}
RADII: dict[str, int] = {"small": 6, "large": 8}  # in units, see `GRID`
POSITIONS: dict[str, tuple[int, int]] = {  # the direction from the image's middle, y downwards
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "centre": (0, 0),
}
RELATIONS: dict[str, tuple[int, int]] = {  # the direction from the second shape to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_POSITION_AT = {direction: word for word, direction in POSITIONS.items()}
_SIDES = {  # the positions of the first shape and the second beside each other
    word: (_POSITION_AT[x, y], _POSITION_AT[-x, -y]) for word, (x, y) in RELATIONS.items()
}
GRID = 32
"""Units of the mean side. Radii and centres are whole units, at resolution 32 whole pixels: outlines are crisp, and a
model has few renderings of each to learn."""
_DRAWING = 3  # version of what is written for equal settings

HELD_OUT: tuple[tuple[str, str, str], ...] = (
    ("red", "star", "top"),
    ("red", "square", "left"),
    ("green", "triangle", "right"),
    ("green", "circle", "centre"),
    ("blue", "star", "right"),
    ("blue", "square", "top"),
    ("yellow", "circle", "left"),
    ("yellow", "triangle", "bottom"),
    ("purple", "star", "left"),
    ("purple", "square", "centre"),
    ("cyan", "circle", "bottom"),
    ("cyan", "triangle", "right"),
)
"""(colour, kind, position): each kind three times, each colour twice, each position two or three times."""

BORDER = 1 / 8  # a centre further than this from the middle (share of the side) has left the middle field
_OFFSET = 0.2  # the least distance of a drawn shape's centre from the middle where it's called left, right, top, bottom
_JITTER = 1  # units: the most that a drawn centre strays from its place
_MARGIN = 1  # units of free space between a shape and the image's edge
_GAP = 2  # units: the least space between two shapes
_OVERSAMPLING = 8
_SIZES_OF_TWO = (("small", "small"), ("small", "large"), ("large", "small"))  # two large ones have no room


def _regular(num_points: int, *radii: float) -> np.ndarray:
    """Points [N, 2] on circles of alternating radii from the top clockwise, stretched to fill the box [-1, 1]²."""
    angles = np.arange(num_points) * 2 * np.pi / num_points
    lengths = np.resize(radii, num_points)
    points = np.stack([lengths * np.sin(angles), -lengths * np.cos(angles)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return 2 * (points - low) / (high - low) - 1


OUTLINES: dict[str, np.ndarray] = {  # polygons [N, 2] in the box [-1, 1]², y downwards
    "circle": _regular(64, 1),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float),
    "triangle": np.array([(0, -1), (1, 1), (-1, 1)], dtype=float),
    "star": _regular(10, 1, 0.5),
}
PAIRS = tuple((colour, kind) for colour in COLOURS for kind in OUTLINES)


@dataclass(frozen=True)
class Shape:
    """One shape. `size` is a key of `RADII`; `centre` is that of its box, (x, y) in 0…1 with y downwards; `radius` is
    half its box's side, as a share of the image's mean side (width + height) / 2."""

    kind: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float

    @property
    def position(self) -> str | None:
        return position_of(*self.centre)


@dataclass(frozen=True)
class Scene:
    """One shape, or two in the order in which the caption names them; `size` is (width, height) in pixels."""

    background: str
    shapes: tuple[Shape, ...]
    size: tuple[int, int]

    @property
    def relation(self) -> str | None:
        """How the first of two shapes stands to the second."""
        first, second = self.shapes
        return relation_of(first.centre, second.centre, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_dict` makes an equal scene."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        shapes = (Shape(**{**shape, "centre": tuple(shape["centre"])}) for shape in values["shapes"])
        width, height = values["size"]
        return cls(values["background"], tuple(shapes), (width, height))


def position_of(x: float, y: float) -> str | None:
    """The word for a centre (x, y in 0…1): the image is cut at 3/8 and 5/8 of each side into nine fields, of which the
    middle one and its four neighbours have a name; the corners have none."""
    direction = tuple(int(abs(offset) > BORDER) * int(math.copysign(1, offset)) for offset in (x - 0.5, y - 0.5))
    return _POSITION_AT.get((direction[0], direction[1]))


def relation_of(first: tuple[float, float], second: tuple[float, float], size: tuple[int, int]) -> str | None:
    """How `first` stands to `second` (centres in 0…1): by the axis on which they lie further apart in pixels; None if
    that's less than an eighth of the mean side."""
    dx, dy = (first[0] - second[0]) * size[0], (first[1] - second[1]) * size[1]
    if max(abs(dx), abs(dy)) < BORDER * sum(size) / 2:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def buckets(resolution: int) -> dict[str, tuple[int, int]]:
    """(width, height) by bucket: 32 gives 32×32, 40×24 and 24×40. `resolution`, the mean side of each, is a multiple of
    32, which makes every side one of 8."""
    long, short = resolution * 5 // 4, resolution * 3 // 4
    return {"square": (resolution, resolution), "wide": (long, short), "tall": (short, long)}


# Drawing


def coverage(kind: str, x: float, y: float, radius: float, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel a shape covers, [height, width] in 0…1; centre and radius in pixels."""
    width, height = size
    canvas = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    # Pillow fills the pixels on a polygon's edge too: half a subpixel less all round makes the area right.
    points = (OUTLINES[kind] * (radius - 0.5 / _OVERSAMPLING) + (x, y)) * _OVERSAMPLING - 0.5
    ImageDraw.Draw(canvas).polygon([(float(u), float(v)) for u, v in points], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / 255


def draw(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 [height, width, 3]."""
    width, height = scene.size
    image = np.full((height, width, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    for shape in scene.shapes:
        x, y = shape.centre
        alpha = coverage(shape.kind, x * width, y * height, shape.radius * (width + height) / 2, scene.size)[..., None]
        image += alpha * (np.array(COLOURS[shape.colour], dtype=np.float32) - image)
    return image.round().astype(np.uint8)


# Sampling


def sample_scene(
    rng: random.Random,
    *,
    num_shapes: int,
    resolution: int = 32,
    pair: tuple[str, str] | None = None,
    place: str | None = None,
    bucket: str | None = None,
) -> Scene:
    """A scene of one or two shapes; what isn't given is drawn from `rng`.

    pair    (colour, kind) of the only shape, or of the one that is named first.
    place   position (one shape) or relation (two shapes).
    bucket  a key of `buckets`.

    No shape is one of `HELD_OUT`, unless both `pair` and `place` are given and say so. Of two shapes, one that is left
    of the other stands at the left, and so on.

    Raises ValueError where `bucket` has no room at `place`: two shapes aren't stacked in a wide image.
    """
    background = rng.choice(list(BACKGROUNDS))
    for _ in range(1000):  # until the shapes have room: a large one has no place at the top of a wide image
        chosen = bucket or rng.choice(("square", "square", "square", "wide", "tall"))
        size = buckets(resolution)[chosen]
        where = place or rng.choice(list(POSITIONS if num_shapes == 1 else RELATIONS))
        sizes = rng.choice((("small",), ("large",)) if num_shapes == 1 else _SIZES_OF_TWO)
        radii = [RADII[name] for name in sizes]
        centres = _one_centre(rng, where, radii[0], size) if num_shapes == 1 else _two_centres(rng, where, radii, size)
        pairs = [pair or rng.choice(PAIRS)]
        if num_shapes == 2:
            pairs.append(rng.choice([other for other in PAIRS if other[0] != pairs[0][0]]))
        if centres is None:
            continue
        shapes = tuple(
            Shape(kind, colour, name, centre, radius / GRID)
            for (colour, kind), name, centre, radius in zip(pairs, sizes, centres, radii, strict=True)
        )
        drawn = [(shape.colour, shape.kind, shape.position) for shape in shapes]
        apart = tuple(position for *_, position in drawn) == _SIDES.get(where, (where,))
        if apart and not set(drawn[1:] if pair and place else drawn) & set(HELD_OUT):
            return Scene(background, shapes, size)
    raise ValueError(f"no room for {num_shapes} shapes with place={place!r} in bucket={bucket!r}")


_Centres = list[tuple[float, float]]


def _one_centre(rng: random.Random, position: str, radius: int, size: tuple[int, int]) -> _Centres | None:
    centre = []
    for direction, side in zip(POSITIONS[position], _units(size), strict=True):
        least = math.ceil(_OFFSET * side)
        most = side // 2 - radius - _MARGIN
        if direction and most < least:
            return None
        low, high = (least, min(most, least + _JITTER)) if direction else (-_JITTER, _JITTER)
        centre.append(0.5 + (direction or 1) * rng.randint(low, high) / side)
    return [(centre[0], centre[1])]


def _two_centres(rng: random.Random, relation: str, radii: list[int], size: tuple[int, int]) -> _Centres | None:
    axis = 0 if RELATIONS[relation][0] else 1
    first_comes_first = sum(RELATIONS[relation]) < 0
    sides = _units(size)
    spare = sides[axis] - 2 * sum(radii) - 2 * _MARGIN - _GAP
    if spare < 0:
        return None
    before, until = sorted((rng.randint(0, spare), rng.randint(0, spare)))
    near, far = radii if first_comes_first else radii[::-1]
    start = _MARGIN + before + near
    along = [start, start + near + _GAP + (until - before) + far]
    centres = []
    for position in along if first_comes_first else along[::-1]:
        across = 0.5 + rng.randint(-_JITTER, _JITTER) / sides[1 - axis]
        centres.append((position / sides[axis], across) if axis == 0 else (across, position / sides[axis]))
    return centres


def _units(size: tuple[int, int]) -> tuple[int, int]:
    """An image's sides in units: (width, height) at resolution `GRID`."""
    width, height = (side * 2 * GRID // sum(size) for side in size)
    return width, height


def evaluation_prompts(
    num: int, seed: int, *, num_shapes: int, held_out: bool, resolution: int = 32, bucket: str = "square"
) -> list[Scene]:
    """Scenes to ask a model for (with `prompt`), all of one bucket: of combinations that are held out, or of those of
    training. Of two shapes it's the one that is named first; the other is one of training. The pairs take turns, and so
    do the positions or relations: no combination is repeated before all have stood once."""
    rng = random.Random(f"evaluation {seed} {num_shapes} {held_out}")
    pairs = rng.sample(PAIRS, len(PAIRS))
    places = list(POSITIONS if num_shapes == 1 else RELATIONS)
    wanted = [
        (pair, place)
        for turn in range(len(places))
        for column, pair in enumerate(pairs)
        for place in [places[(column + turn) % len(places)]]
        if ((*pair, _SIDES.get(place, (place,))[0]) in HELD_OUT) == held_out
    ]
    return [
        sample_scene(rng, num_shapes=num_shapes, resolution=resolution, pair=pair, place=place, bucket=bucket)
        for pair, place in itertools.islice(itertools.cycle(wanted), num)
    ]


# Captions

_POSITION_WORDINGS: dict[str, tuple[str, ...]] = {
    "left": ("at the left", "on the left", "on the left side"),
    "right": ("at the right", "on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
}
_RELATION_WORDINGS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "at the left of", "left of"),
    "right of": ("to the right of", "at the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def prompt(scene: Scene) -> str:
    """The caption that states colour and shape, and the position or the relation, and nothing else."""
    names = [f"a {shape.colour} {shape.kind}" for shape in scene.shapes]
    if len(names) == 1:
        return f"{names[0]} {_POSITION_WORDINGS[str(scene.shapes[0].position)][0]}"
    return f"{names[0]} {_RELATION_WORDINGS[str(scene.relation)][0]} {names[1]}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption in one of several wordings and lengths; size, position and background may be left out."""
    names = [
        f"a {shape.size} {shape.colour} {shape.kind}" if rng.random() < 0.5 else f"a {shape.colour} {shape.kind}"
        for shape in scene.shapes
    ]
    if len(names) == 1:
        where = rng.choice(_POSITION_WORDINGS[str(scene.shapes[0].position)])
        text = f"{names[0]} {where}" if rng.random() < 0.85 else names[0]
    elif rng.random() < 0.9:
        text = f"{names[0]} {rng.choice(_RELATION_WORDINGS[str(scene.relation)])} {names[1]}"
    else:
        text = f"{names[0]} and {names[1]}"
    ground = f"a {scene.background} background"
    return rng.choices(
        (text, f"there is {text}", f"{text} on {ground}", f"there is {text} on {ground}", f"{ground} with {text}"),
        weights=(5, 1.5, 2, 1, 1),
    )[0]


# Shards


class SynthConfig(Config):
    """Which scenes are drawn: everything but the folder they go to."""

    num_samples: int = pydantic.Field(default=12000, ge=1)
    samples_per_shard: int = pydantic.Field(default=1000, ge=1)
    resolution: int = pydantic.Field(default=32, ge=32, multiple_of=32)
    seed: Seed = 0
    two_shape_share: float = pydantic.Field(default=0.2, ge=0, le=1)
    image_format: Literal["png", "webp"] = "png"


def make_sample(config: SynthConfig, index: int) -> tuple[Scene, str]:
    """Scene and caption of training sample `index`: a function of (seed, index) and the settings alone."""
    rng = random.Random(f"train {config.seed} {index}")
    num_shapes = 2 if rng.random() < config.two_shape_share else 1
    scene = sample_scene(rng, num_shapes=num_shapes, resolution=config.resolution)
    return scene, caption(scene, rng)


def write_shards(out: Path, config: SynthConfig, progress: Callable[[int], None] | None = None) -> None:
    """Write NNNNN.tar of KEY.png, KEY.txt, KEY.json (the scene under "scene", the first shape's place in
    `OUTLINES` under "label") and NNNNN_stats.json into `out`.

    A shard appears by rename, after its statistics, and one that is there already is kept: the same call again goes on
    where it was stopped, and ends with the same bytes. `progress` is called with the number of samples done so far.
    Raises UserError if `out` holds shards that were not drawn with these settings.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another for the shards")
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_shards(out, config)
    for shard, start in enumerate(range(0, config.num_samples, config.samples_per_shard)):
        indices = range(start, min(start + config.samples_per_shard, config.num_samples))
        target = out / f"{shard:05d}.tar"
        if not target.exists():
            _write_statistics(_statistics_path(target), config, len(indices))
            _write_shard(target, config, indices)
        if progress is not None:
            progress(indices.stop)


def _statistics_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def _refuse_other_shards(out: Path, config: SynthConfig) -> None:
    remedy = "choose another folder, or empty this one"
    for shard in sorted(out.glob("*.tar")):
        if not _statistics_path(shard).exists():
            raise UserError(f"{shard}: not a shard of drawn scenes (it has no statistics file); {remedy}")
    for path in sorted(out.glob("*_stats.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["synthetic"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the statistics of drawn scenes; {remedy}") from None
        wanted = _facts(config)
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{path}: drawn with {key}={found.get(key)!r}, asked for {key}={wanted.get(key)!r}; {remedy}"
                )


def _facts(config: SynthConfig) -> dict[str, Any]:
    return {**config.model_dump(mode="json"), "drawing": _DRAWING}


def _write_statistics(path: Path, config: SynthConfig, count: int) -> None:
    statistics = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": count},
        "synthetic": _facts(config),
    }
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(statistics, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _write_shard(target: Path, config: SynthConfig, indices: range) -> None:
    from webdataset import TarWriter

    partial = target.with_name(f"{target.name}.tmp")
    # mtime=0: the same bytes whenever it is written. The stream is ours because a name would go through URL expansion.
    with partial.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
        for index in indices:
            key = f"{index:09d}"
            scene, text = make_sample(config, index)
            picture = io.BytesIO()
            Image.fromarray(draw(scene)).save(picture, config.image_format, lossless=True)
            width, height = scene.size
            facts = {
                "key": key,
                "caption": text,
                "width": width,
                "height": height,
                "original_width": width,
                "original_height": height,
                "status": "success",
                "scene": scene.to_dict(),
                "label": list(OUTLINES).index(scene.shapes[0].kind),
            }
            sample = {"txt": text.encode(), "json": json.dumps(facts).encode()}
            writer.write({"__key__": key, config.image_format: picture.getvalue(), **sample})
    os.replace(partial, target)
