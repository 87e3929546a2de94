"""The judge of drawn scenes: right on true renders and on soft, noisy ones, and able to say no."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from stack.data.synthetic import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    OUTLINES,
    PAIRS,
    POSITIONS,
    RADII,
    RELATIONS,
    Scene,
    Shape,
    coverage,
    draw,
    evaluation_prompts,
    sample_scene,
)
from stack.evaluate.scenes import Verdict, accuracy, detect, judge

WRONG = Verdict(shape=False, colour=False, position=False)


def scenes(num: int, num_shapes: int, resolution: int = 32) -> list[Scene]:
    """Scenes of every pair, bucket, size, colour and background."""
    rng = random.Random(f"{num_shapes} {resolution}")
    return [
        sample_scene(rng, num_shapes=num_shapes, resolution=resolution, pair=PAIRS[index % len(PAIRS)])
        for index in range(num)
    ]


def degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scaled down and up by 1.5, slightly blurred, with noise of sigma 12 of 255."""
    height, width, _ = image.shape
    picture = Image.fromarray(image)
    for size in ((round(width / 1.5), round(height / 1.5)), (width, height)):
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5)), dtype=float)
    return np.clip(soft + rng.normal(0, 12, soft.shape), 0, 255).round().astype(np.uint8)


def replaced(scene: Scene, **changes: object) -> Scene:
    return replace(scene, shapes=(replace(scene.shapes[0], **changes), *scene.shapes[1:]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_shapes", "resolution", "least"), [(1, 32, 0.99), (2, 32, 0.97), (1, 64, 0.99)])
def test_true_renders_are_right(num_shapes: int, resolution: int, least: float) -> None:
    drawn = scenes(1200 if resolution == 32 else 300, num_shapes, resolution)
    found = accuracy(map(draw, drawn), drawn)
    assert found["num"] == len(drawn)
    assert found["all_right"] >= least, found


def test_every_kind_colour_background_and_size_is_read_right() -> None:
    for kind in OUTLINES:
        for colour in COLOURS:
            for background in BACKGROUNDS:
                for size, radius in RADII.items():
                    shape = Shape(kind, colour, size, (0.51, 0.48), radius / GRID)
                    (found,) = detect(draw(Scene(background, (shape,), (32, 32))))
                    assert (found.kind, found.colour, found.position) == (kind, colour, "centre")
                    assert found.centre == pytest.approx(shape.centre, abs=0.03)
                    assert found.overlap > 0.9


@pytest.mark.parametrize(("num_shapes", "least"), [(1, 0.97), (2, 0.95)])
def test_soft_and_noisy_renders_are_right(num_shapes: int, least: float) -> None:
    drawn = scenes(1000, num_shapes)
    rng = np.random.default_rng(0)
    found = accuracy((degraded(draw(scene), rng) for scene in drawn), drawn)
    assert found["all_right"] >= least, found


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("field", ["colour", "kind", "centre"])
def test_one_wrong_property_is_judged_wrong_and_the_others_right(field: str, noisy: bool) -> None:
    rng, noise = random.Random(field), np.random.default_rng(0)
    verdicts = []
    for scene in scenes(600, 1):
        shape = scene.shapes[0]
        if field == "centre":
            word = rng.choice([word for word in POSITIONS if word != shape.position])
            x, y = (0.5 + 0.3 * direction for direction in POSITIONS[word])
            asked = replaced(scene, centre=(x, y))
        else:
            others: list[str] = [*(COLOURS if field == "colour" else OUTLINES)]
            others.remove(getattr(shape, field))
            asked = replaced(scene, **{field: rng.choice(others)})
        image = draw(scene)
        verdicts.append(judge(degraded(image, noise) if noisy else image, asked))
    expected = Verdict(shape=field != "kind", colour=field != "colour", position=field != "centre")
    assert np.mean([not verdict.all_right for verdict in verdicts]) >= 0.99
    assert np.mean([verdict == expected for verdict in verdicts]) >= 0.97


def test_two_shapes_in_the_wrong_relation_or_with_swapped_colours_or_kinds_are_wrong() -> None:
    for scene in scenes(150, 2):
        image = draw(scene)
        first, second = scene.shapes
        assert judge(image, scene) == Verdict(shape=True, colour=True, position=True)
        mirrored = replace(scene, shapes=(replace(first, centre=second.centre), replace(second, centre=first.centre)))
        assert judge(image, mirrored) == Verdict(shape=True, colour=True, position=False)
        colours = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        assert not judge(image, replace(scene, shapes=colours)).all_right
        if first.kind != second.kind:
            kinds = (replace(first, kind=second.kind), replace(second, kind=first.kind))
            assert not judge(image, replace(scene, shapes=kinds)).all_right


def test_relation_across_the_asked_axis_is_wrong() -> None:
    shapes = (Shape("star", "red", "small", (0.3, 0.2), 0.16), Shape("circle", "cyan", "small", (0.6, 0.8), 0.16))
    scene = Scene("white", shapes, (32, 32))
    assert scene.relation == "above"
    beside = replace(scene, shapes=(replace(shapes[0], centre=(0.2, 0.5)), replace(shapes[1], centre=(0.8, 0.5))))
    assert judge(draw(scene), beside) == Verdict(shape=True, colour=True, position=False)


def test_a_missing_or_an_extra_shape_is_wrong_in_everything() -> None:
    for scene in scenes(100, 2):
        alone = replace(scene, shapes=scene.shapes[:1])
        assert judge(draw(scene), alone) == WRONG
        assert judge(draw(alone), scene) == WRONG


def test_empty_images_and_noise_are_wrong() -> None:
    rng = np.random.default_rng(0)
    asked = evaluation_prompts(300, 0, num_shapes=1, held_out=False)
    assert accuracy((draw(replace(scene, shapes=())) for scene in asked), asked)["all_right"] == 0
    flat = (np.full((32, 32, 3), rng.integers(0, 256, 3), dtype=np.uint8) for _ in asked)
    assert accuracy(flat, asked)["all_right"] == 0
    noise = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in asked)
    assert accuracy(noise, asked)["all_right"] == 0
    pale = (np.clip(rng.normal(128, 20, (32, 32, 3)), 0, 255).astype(np.uint8) for _ in asked)
    assert accuracy(pale, asked)["all_right"] == 0


def test_rings_frames_and_two_coloured_shapes_are_not_taken_for_shapes() -> None:
    for scene in evaluation_prompts(130, 0, num_shapes=1, held_out=False):
        shape = replace(scene.shapes[0], radius=0.24, centre=(0.5, 0.5))
        whole = replace(scene, shapes=(shape,))
        hole = coverage(shape.kind, 16, 16, 0.24 * 32 * 0.6, (32, 32))[..., None]
        image = draw(whole)
        hollow = (image + hole * (np.array(BACKGROUNDS[scene.background]) - image)).astype(np.uint8)
        assert all(found.kind != shape.kind for found in detect(hollow))
        other = next(colour for colour in COLOURS if colour != shape.colour)
        image[:, 16:] = draw(replaced(whole, colour=other))[:, 16:]
        assert all(found.colour is None for found in detect(image))


def test_a_shape_in_a_corner_has_no_position() -> None:
    corner = Scene("black", (Shape("circle", "green", "small", (0.25, 0.25), 0.16),), (32, 32))
    for word, (x, y) in POSITIONS.items():
        asked = replaced(corner, centre=(0.5 + 0.3 * x, 0.5 + 0.3 * y))
        assert asked.shapes[0].position == word
        assert judge(draw(corner), asked) == Verdict(shape=True, colour=True, position=False)


def test_specks_are_overlooked() -> None:
    for scene in scenes(50, 1):
        image = draw(scene)
        image[:2, :2] = COLOURS["purple"]
        assert judge(image, scene).all_right


def test_accuracy_is_the_share_of_right_verdicts() -> None:
    drawn = evaluation_prompts(10, 0, num_shapes=1, held_out=True)
    images = [draw(scene) for scene in drawn[:5]] + [np.zeros((32, 32, 3), dtype=np.uint8)] * 5
    assert accuracy(images, drawn) == {"num": 10, "shape": 0.5, "colour": 0.5, "position": 0.5, "all_right": 0.5}
    with pytest.raises(ValueError, match="no images"):
        accuracy([], [])
    with pytest.raises(ValueError, match="zip"):
        accuracy(images, drawn[:5])


def test_relations_of_two_are_all_judged() -> None:
    for relation in RELATIONS:
        scene = sample_scene(random.Random(0), num_shapes=2, place=relation)
        assert judge(draw(scene), scene).all_right


def test_judging_takes_milliseconds() -> None:
    drawn = scenes(200, 2)
    images = [draw(scene) for scene in drawn]
    start = time.process_time()
    accuracy(images, drawn)
    assert (time.process_time() - start) / len(drawn) < 0.015  # about 2 ms; slack for a busy machine
