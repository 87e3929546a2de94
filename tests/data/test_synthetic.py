"""Drawn scenes: what may stand in them, what is said of them, and shards that come out the same each time."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stack.config import UserError
from stack.data import synthetic
from stack.data.synthetic import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    HELD_OUT,
    OUTLINES,
    PAIRS,
    POSITIONS,
    RELATIONS,
    Scene,
    Shape,
    SynthConfig,
    buckets,
    caption,
    coverage,
    draw,
    evaluation_prompts,
    make_sample,
    position_of,
    prompt,
    relation_of,
    sample_scene,
    write_shards,
)

SAMPLES = [make_sample(SynthConfig(), index) for index in range(3000)]


def read(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_colours_and_backgrounds_are_far_apart() -> None:
    palette = [np.array(c, dtype=float) for c in (*COLOURS.values(), *BACKGROUNDS.values())]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(palette, 2)) > 110


def combinations(scene: Scene) -> list[tuple[str, str, str | None]]:
    return [(shape.colour, shape.kind, shape.position) for shape in scene.shapes]


def test_held_out_combinations_are_balanced_and_never_train() -> None:
    colours, kinds, positions = (Counter(values) for values in zip(*HELD_OUT, strict=True))
    assert len(set(HELD_OUT)) == len(HELD_OUT) == 12
    assert set(colours.values()) == {2}
    assert set(kinds.values()) == {3}
    assert set(positions) == set(POSITIONS)
    assert set(positions.values()) == {2, 3}
    for num_shapes in (1, 2):
        drawn = {
            combination
            for index in range(4000)
            for combination in combinations(sample_scene(random.Random(index), num_shapes=num_shapes))
        }
        places = POSITIONS if num_shapes == 1 else ("left", "right", "top", "bottom")
        everything = {(*pair, place) for pair in PAIRS for place in places}
        assert drawn == everything - set(HELD_OUT)
    for scene, text in SAMPLES:
        assert not set(combinations(scene)) & set(HELD_OUT), text


def test_training_scenes_cover_everything_in_the_shares_asked_for() -> None:
    ones = [scene for scene, _ in SAMPLES if len(scene.shapes) == 1]
    twos = [scene for scene, _ in SAMPLES if len(scene.shapes) == 2]
    assert len(ones) / len(SAMPLES) == pytest.approx(0.8, abs=0.03)
    sizes = Counter(scene.size for scene, _ in SAMPLES)
    assert set(sizes) == {(32, 32), (40, 24), (24, 40)}
    assert min(sizes.values()) > 0.15 * len(SAMPLES)
    assert min(Counter(scene.shapes[0].position for scene in ones)[word] for word in POSITIONS) > 0.1 * len(ones)
    assert min(Counter(scene.relation for scene in twos)[word] for word in RELATIONS) > 0.2 * len(twos)
    assert {scene.background for scene, _ in SAMPLES} == set(BACKGROUNDS)
    assert {shape.size for scene in ones for shape in scene.shapes} == {"small", "large"}


@pytest.mark.parametrize("resolution", [32, 64])
def test_shapes_lie_whole_inside_and_apart(resolution: int) -> None:
    for index in range(400):
        rng = random.Random(index)
        scene = sample_scene(rng, num_shapes=1 + index % 2, resolution=resolution)
        width, height = scene.size
        assert width % 8 == height % 8 == 0
        boxes = []
        for shape in scene.shapes:
            x, y, radius = shape.centre[0] * width, shape.centre[1] * height, shape.radius * resolution
            assert radius < x < width - radius
            assert radius < y < height - radius
            for length in (x, y, radius):
                assert length * GRID / resolution == pytest.approx(round(length * GRID / resolution), abs=1e-9)
            assert 2 * radius * GRID / resolution >= 12
            boxes.append((x, y, radius))
        if len(boxes) == 2:
            (x1, y1, r1), (x2, y2, r2) = boxes
            assert max(abs(x1 - x2), abs(y1 - y2)) - r1 - r2 >= 2 * resolution / GRID - 1e-9
            assert len({shape.colour for shape in scene.shapes}) == 2


def test_a_square_on_the_grid_covers_whole_pixels() -> None:
    covered = coverage("square", 16, 15, 6, (32, 32))
    assert set(np.unique(covered)) == {0, 1}
    assert covered[9:21, 10:22].all()
    assert covered.sum() == 144


@pytest.mark.parametrize("kind", OUTLINES)
def test_coverage_has_the_box_and_the_area_asked_for(kind: str) -> None:
    assert np.abs(OUTLINES[kind]).max(axis=0) == pytest.approx([1, 1])
    covered = coverage(kind, 20, 15, 10, (40, 32))
    rows, columns = np.flatnonzero(covered.max(axis=1) > 0.1), np.flatnonzero(covered.max(axis=0) > 0.1)
    assert covered.shape == (32, 40)
    assert abs((columns[0] + columns[-1] + 1) / 2 - 20) <= 0.5
    assert abs((rows[0] + rows[-1] + 1) / 2 - 15) <= 0.5
    x, y = OUTLINES[kind].T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 * 100
    assert covered.sum() == pytest.approx(area, rel=0.04)


def test_draw_shows_pure_colours_inside_and_outside() -> None:
    scene = Scene("grey", (Shape("square", "red", "large", (0.3, 0.5), 0.25),), (32, 32))
    image = draw(scene)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert tuple(image[16, 9]) == COLOURS["red"]
    assert tuple(image[16, 25]) == BACKGROUNDS["grey"]
    assert draw(Scene("white", scene.shapes, (40, 24))).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("centre", "word"),
    [
        ((0.2, 0.5), "left"),
        ((0.8, 0.6), "right"),
        ((0.5, 0.3), "top"),
        ((0.4, 0.9), "bottom"),
        ((0.6, 0.4), "centre"),
        ((0.3, 0.3), None),
        ((0.7, 0.3), None),
    ],
)
def test_position_of(centre: tuple[float, float], word: str | None) -> None:
    assert position_of(*centre) == word


def test_relation_of_goes_by_pixels_and_has_no_word_for_shapes_in_one_place() -> None:
    assert relation_of((0.2, 0.5), (0.8, 0.5), (32, 32)) == "left of"
    assert relation_of((0.8, 0.5), (0.2, 0.5), (32, 32)) == "right of"
    assert relation_of((0.5, 0.2), (0.5, 0.8), (32, 32)) == "above"
    assert relation_of((0.5, 0.8), (0.5, 0.2), (32, 32)) == "below"
    assert relation_of((0.3, 0.2), (0.7, 0.7), (40, 24)) == "left of"  # 16 pixels against 12
    assert relation_of((0.5, 0.5), (0.55, 0.55), (32, 32)) is None


@pytest.mark.parametrize("place", [*POSITIONS, *RELATIONS])
def test_scenes_stand_where_they_were_asked_to(place: str) -> None:
    for index in range(60):
        scene = sample_scene(random.Random(index), num_shapes=1 if place in POSITIONS else 2, place=place)
        assert place == (scene.shapes[0].position if place in POSITIONS else scene.relation)


def test_scenes_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="no room for 2 shapes with place='above' in bucket='wide'"):
        sample_scene(random.Random(0), num_shapes=2, place="above", bucket="wide")


def test_scene_goes_to_json_and_back() -> None:
    for scene, _ in SAMPLES[:100]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_prompt_states_colour_shape_and_position_in_words_of_training() -> None:
    star = Shape("star", "red", "small", (0.2, 0.5), 0.16)
    circle = Shape("circle", "blue", "large", (0.7, 0.5), 0.24)
    assert prompt(Scene("white", (star,), (32, 32))) == "a red star at the left"
    assert prompt(Scene("white", (star, circle), (32, 32))) == "a red star to the left of a blue circle"
    assert prompt(Scene("white", (circle, star), (32, 32))) == "a blue circle to the right of a red star"
    trained_words = {word for _, text in SAMPLES for word in text.split()}
    for place in (*POSITIONS, *RELATIONS):
        scene = sample_scene(random.Random(place), num_shapes=1 if place in POSITIONS else 2, place=place)
        assert set(prompt(scene).split()) <= trained_words
        assert prompt(scene) in {caption(scene, random.Random(seed)) for seed in range(300)}


def test_captions_are_true_and_vary_in_wording_and_length() -> None:
    lengths = Counter(len(text.split()) for _, text in SAMPLES)
    assert min(lengths) == 3
    assert max(lengths) >= 14
    assert len({text for _, text in SAMPLES}) > 1000
    for scene, text in SAMPLES:
        words = text.split()
        for group in (COLOURS, OUTLINES):
            told = [word for word in words if word in group and words[words.index(word) + 1 :][:1] != ["background"]]
            field = "colour" if group is COLOURS else "kind"
            assert told == [getattr(shape, field) for shape in scene.shapes]
        assert {word for word in words if word in BACKGROUNDS} <= {scene.background}
        assert {word for word in words if word in ("small", "large")} <= {shape.size for shape in scene.shapes}
        if len(scene.shapes) == 1:
            said = {word for word in POSITIONS if word in words}
            assert said <= {scene.shapes[0].position}


@pytest.mark.parametrize("num_shapes", [1, 2])
@pytest.mark.parametrize("held_out", [True, False])
def test_evaluation_prompts_are_balanced(num_shapes: int, held_out: bool) -> None:
    scenes = evaluation_prompts(80, 0, num_shapes=num_shapes, held_out=held_out)
    assert scenes == evaluation_prompts(80, 0, num_shapes=num_shapes, held_out=held_out)
    assert scenes != evaluation_prompts(80, 1, num_shapes=num_shapes, held_out=held_out)
    first = [combinations(scene)[0] for scene in scenes]
    assert all((combination in HELD_OUT) == held_out for combination in first)
    assert not {second for scene in scenes for second in combinations(scene)[1:]} & set(HELD_OUT)
    assert {scene.size for scene in scenes} == {(32, 32)}
    places = POSITIONS if num_shapes == 1 else ("left", "right", "top", "bottom")
    wanted = {(*pair, place) for pair in PAIRS for place in places if ((*pair, place) in HELD_OUT) == held_out}
    times = Counter(first)
    if len(wanted) <= len(scenes):
        assert set(times) == wanted
        assert max(times.values()) - min(times.values()) <= 1
    else:
        assert len(times) == len(scenes)
    assert set(Counter(place for *_, place in first)) == set(places)


def test_evaluation_prompts_in_other_buckets() -> None:
    for bucket, size in buckets(64).items():
        scenes = evaluation_prompts(26, 0, num_shapes=1, held_out=False, resolution=64, bucket=bucket)
        assert {scene.size for scene in scenes} == {size}


def test_shards_follow_the_img2dataset_layout_and_tell_the_truth(tmp_path: Path) -> None:
    config = SynthConfig(num_samples=25, samples_per_shard=10)
    done: list[int] = []
    write_shards(tmp_path / "a", config, done.append)
    assert done == [10, 20, 25]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        f"{shard:05d}{end}" for shard in range(3) for end in (".tar", "_stats.json")
    ]
    members = {name: data for shard in sorted(tmp_path.glob("a/*.tar")) for name, data in read(shard).items()}
    assert {name.split(".")[0] for name in members} == {f"{index:09d}" for index in range(25)}
    assert len(members) == 75
    for index in range(25):
        facts = json.loads(members[f"{index:09d}.json"])
        scene, text = make_sample(config, index)
        assert Scene.from_dict(facts["scene"]) == scene
        assert members[f"{index:09d}.txt"].decode() == facts["caption"] == text
        image = np.asarray(Image.open(io.BytesIO(members[f"{index:09d}.png"])))
        assert np.array_equal(image, draw(scene))
        assert (facts["width"], facts["height"]) == scene.size == image.shape[1::-1]
    assert json.loads((tmp_path / "a" / "00002_stats.json").read_text())["count"] == 5


def test_webp_shards_are_lossless(tmp_path: Path) -> None:
    config = SynthConfig(num_samples=3, image_format="webp")
    write_shards(tmp_path, config)
    image = Image.open(io.BytesIO(read(tmp_path / "00000.tar")["000000002.webp"]))
    assert np.array_equal(np.asarray(image.convert("RGB")), draw(make_sample(config, 2)[0]))


def test_shards_have_the_same_bytes_each_time_and_others_with_another_seed(tmp_path: Path) -> None:
    config = SynthConfig(num_samples=12, samples_per_shard=12)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shards(tmp_path / name, config.model_copy(update={"seed": seed}))
    a, b, c = ((tmp_path / name / "00000.tar").read_bytes() for name in "abc")
    assert a == b != c


def test_stopped_run_goes_on_and_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SynthConfig(num_samples=30, samples_per_shard=10)
    write_shards(tmp_path / "whole", config)

    def stop_in_the_second_shard(config: SynthConfig, index: int) -> tuple[Scene, str]:
        if index == 15:
            raise KeyboardInterrupt
        return make_sample(config, index)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "make_sample", stop_in_the_second_shard)
        with pytest.raises(KeyboardInterrupt):
            write_shards(tmp_path / "out", config)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["00000.tar"]
    kept = (tmp_path / "out" / "00000.tar").stat()
    write_shards(tmp_path / "out", config)
    assert (tmp_path / "out" / "00000.tar").stat() == kept
    names = [path.name for path in sorted((tmp_path / "whole").iterdir())]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_folder_with_other_shards_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_shards(tmp_path / "ours", SynthConfig(num_samples=3))
    before = (tmp_path / "ours" / "00000.tar").read_bytes()
    with pytest.raises(UserError, match=r"00000_stats\.json: drawn with seed=0, asked for seed=7"):
        write_shards(tmp_path / "ours", SynthConfig(num_samples=3, seed=7))
    assert (tmp_path / "ours" / "00000.tar").read_bytes() == before
    statistics = tmp_path / "ours" / "00000_stats.json"
    statistics.write_text(statistics.read_text().replace('"drawing": 3', '"drawing": 1'))
    with pytest.raises(UserError, match=r"00000_stats\.json: drawn with drawing=1, asked for drawing=3"):
        write_shards(tmp_path / "ours", SynthConfig(num_samples=3))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"00000\.tar: not a shard of drawn scenes"):
        write_shards(tmp_path / "foreign", SynthConfig(num_samples=3))
    (tmp_path / "foreign" / "00000_stats.json").write_text('{"count": 1}')
    with pytest.raises(UserError, match=r"00000_stats\.json: not the statistics of drawn scenes"):
        write_shards(tmp_path / "foreign", SynthConfig(num_samples=3))
    assert (tmp_path / "foreign" / "00000.tar").read_bytes() == b"somebody's"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        write_shards(tmp_path / "file", SynthConfig(num_samples=3))


@pytest.mark.parametrize("setting", [{"resolution": 40}, {"num_samples": 0}, {"two_shape_share": 1.5}])
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        SynthConfig.model_validate(setting)
