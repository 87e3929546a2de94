"""The judge of drawn scenes: finds the coloured shapes on a plain ground and compares them with what was asked for.

Every pixel is read as a mixture of the ground and one colour of the palette, p = g + α (c − g). Where α exceeds one
half stands a shape; a connected piece's kind is the outline whose rendering overlaps best with α. Nothing here is
learnt, and the image is read before the scene is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from stack.data.synthetic import COLOURS, GRID, OUTLINES, RADII, Scene, coverage, position_of, relation_of

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_COLOUR_RADIUS = 90.0  # RGB distance beyond which a pixel has no colour of the palette
_COLOUR_SHARE = 0.6  # of a shape's core pixels must have its colour
_LEAST_OVERLAP = 0.75  # intersection over union below which a piece has no kind
_BLUR = 0.025  # of the mean side: the softness of outlines that counts as the shape all the same
_LEAST_AREA = 0.3  # of the smallest drawn shape's area; less is a speck and no object


def _area_and_centroid(outline: np.ndarray) -> tuple[float, np.ndarray]:
    """Of a polygon [N, 2], by the shoelace formula."""
    following = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * following[:, 1] - following[:, 0] * outline[:, 1]
    return abs(cross.sum()) / 2, (cross[:, None] * (outline + following)).sum(axis=0) / (3 * cross.sum())


_MOMENTS = {kind: _area_and_centroid(outline) for kind, outline in OUTLINES.items()}
_SMALLEST = min(area for area, _ in _MOMENTS.values()) * (min(RADII.values()) / GRID) ** 2


@dataclass(frozen=True)
class Detection:
    """A piece that stands out from the ground; `kind` and `colour` are None where it's like nothing that is drawn.
    `centre` is that of its box, in 0…1; `overlap` the intersection over union with the best outline."""

    kind: str | None
    colour: str | None
    centre: tuple[float, float]
    overlap: float

    @property
    def position(self) -> str | None:
        return position_of(*self.centre)


@dataclass(frozen=True)
class Verdict:
    """What is right. Of two shapes, `shape` and `colour` are those of both, and `position` is their relation."""

    shape: bool
    colour: bool
    position: bool

    @property
    def all_right(self) -> bool:
        return self.shape and self.colour and self.position


def detect(image: np.ndarray) -> list[Detection]:
    """Everything that stands on the ground of an image, uint8 [height, width, 3]."""
    height, width, _ = image.shape
    pixels = image.astype(np.float32)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    least_area = _LEAST_AREA * _SMALLEST * ((width + height) / 2) ** 2
    stands_out = _best_mixture(pixels, ground, _PALETTE) > 0.5
    return [_describe(pixels, ground, piece) for piece in _pieces(stands_out) if piece.sum() >= least_area]


def _best_mixture(pixels: np.ndarray, ground: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """α in 0…1, [height, width], of that one of `colours` [K, 3] with which g + α (c − g) comes nearest to a pixel."""
    directions = colours - ground
    lengths = np.square(directions).sum(axis=1) + 1e-6
    products = (pixels - ground) @ directions.T
    alphas = np.clip(products / lengths, 0, 1)
    error = alphas**2 * lengths - 2 * alphas * products  # ‖p − g − α (c − g)‖² − ‖p − g‖²
    return np.take_along_axis(alphas, error.argmin(axis=-1)[..., None], axis=-1)[..., 0]


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces (over edges) of a mask, as masks, by flood fill."""
    padded = np.pad(mask, 1)  # so that no neighbour of a pixel lies beyond the row's end
    stride = padded.shape[1]
    unvisited = set(np.flatnonzero(padded).tolist())
    pieces = []
    while unvisited:
        piece = np.zeros(padded.size, dtype=bool)
        frontier = [unvisited.pop()]
        while frontier:
            pixel = frontier.pop()
            piece[pixel] = True
            near = {pixel - 1, pixel + 1, pixel - stride, pixel + stride} & unvisited
            unvisited -= near
            frontier.extend(near)
        pieces.append(piece.reshape(padded.shape)[1:-1, 1:-1])
    return pieces


def _describe(pixels: np.ndarray, ground: np.ndarray, piece: np.ndarray) -> Detection:
    height, width = piece.shape
    rows, columns = np.flatnonzero(piece.any(axis=1)), np.flatnonzero(piece.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    centre = (float(left + right) / 2 / width, float(top + bottom) / 2 / height)
    colour = _colour(pixels[_core(piece)])
    tint = np.median(pixels[piece], axis=0) if colour is None else np.array(COLOURS[colour], dtype=np.float32)
    # One more pixel around the piece: there lies the outer half of its anti-aliased edge.
    window = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
    alpha = _best_mixture(pixels[window], ground, tint[None]) * _grown(piece)[window]
    kind, overlap = _best_kind(alpha, _BLUR * (width + height) / 2)
    return Detection(kind if overlap >= _LEAST_OVERLAP else None, colour, centre, overlap)


def _core(piece: np.ndarray) -> np.ndarray:
    """The piece without its rim, where the ground shines through; all of it if nothing else is left."""
    padded = np.pad(piece, 1)
    core = piece & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return core if core.any() else piece


def _grown(piece: np.ndarray) -> np.ndarray:
    """The piece and all pixels that touch it, at corners too."""
    padded = np.pad(piece, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def _colour(pixels: np.ndarray) -> str | None:
    """The name that most of `pixels` [N, 3] vote for, if there are enough of them."""
    distances = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1)
    votes = distances.argmin(axis=1)[distances.min(axis=1) < _COLOUR_RADIUS]
    counts = np.bincount(votes, minlength=len(_PALETTE))
    return list(COLOURS)[counts.argmax()] if counts.max() >= _COLOUR_SHARE * len(pixels) else None


def _best_kind(alpha: np.ndarray, blur: float) -> tuple[str, float]:
    """The kind whose outline, with the area and centroid of `alpha` [height, width], has the greatest intersection over
    union with it, and that ratio. Each outline is tried sharp and blurred (by `blur` pixels): an image that went
    through an autoencoder is soft, and beside sharp outlines a soft star is likest a square."""
    height, width = alpha.shape
    area = float(alpha.sum())
    rows, columns = np.indices(alpha.shape) + 0.5
    centroid = np.array([(alpha * columns).sum(), (alpha * rows).sum()]) / area
    overlaps = {}
    for kind, (unit_area, unit_centroid) in _MOMENTS.items():
        radius = float(np.sqrt(area / unit_area))
        x, y = (centroid - radius * unit_centroid).tolist()
        sharp = coverage(kind, x, y, radius, (width, height))
        overlaps[kind] = max(_overlap(alpha, sharp), _overlap(alpha, _blurred(sharp, blur)))
    kind = max(overlaps, key=overlaps.__getitem__)
    return kind, overlaps[kind]


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


def _blurred(covered: np.ndarray, sigma: float) -> np.ndarray:
    picture = Image.fromarray((covered * 255).round().astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32) / 255


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Whether an image, uint8 [height, width, 3], shows what `prompt(scene)` asks for.

    The image must hold as many objects as the scene has shapes, or nothing of it is right. One shape's position is
    right if the centre of its box lies in the field of that name (`position_of`: the middle fields of a 3×3 grid with
    its borders at 3/8 and 5/8, and no corner); two shapes' relation if `relation_of` gives the same word.
    """
    found = detect(image)
    if len(found) != len(scene.shapes):
        return Verdict(shape=False, colour=False, position=False)
    if len(found) == 1:
        return _compare(found, scene, found[0].position == scene.shapes[0].position)
    height, width, _ = image.shape
    verdicts = [
        _compare(pair, scene, relation_of(pair[0].centre, pair[1].centre, (width, height)) == scene.relation)
        for pair in (found, found[::-1])
    ]
    return max(verdicts, key=lambda verdict: (verdict.shape + verdict.colour, verdict.position))


def _compare(found: list[Detection], scene: Scene, position: bool) -> Verdict:
    pairs = list(zip(found, scene.shapes, strict=True))
    return Verdict(
        shape=all(detection.kind == shape.kind for detection, shape in pairs),
        colour=all(detection.colour == shape.colour for detection, shape in pairs),
        position=position,
    )


def accuracy(images: Iterable[np.ndarray], scenes: Iterable[Scene]) -> dict[str, float]:
    """`shares` of the verdicts on `images`."""
    return shares([judge(image, scene) for image, scene in zip(images, scenes, strict=True)])


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of what is right in shape, colour, position and all three (`all_right`), and the number of verdicts."""
    if not verdicts:
        raise ValueError("accuracy of no images")
    names = ("shape", "colour", "position", "all_right")
    return {"num": len(verdicts), **{name: float(np.mean([getattr(v, name) for v in verdicts])) for name in names}}
