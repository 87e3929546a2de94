from pathlib import Path

import pytest

from stack.config import UserError, dump, load
from stack.models.mmdit import MMDiTConfig
from stack.models.presets import PRESETS, parameter_counts, resolve

PUBLISHED = {  # depth: without, with QK-RMSNorm; the position table not counted
    15: (496_066_624, 496_070_464),
    18: (856_159_552, 856_164_160),
    24: (2_028_328_000, 2_028_334_144),
    30: (3_962_392_384, 3_962_400_064),
    38: (8_056_617_792, 8_056_627_520),
}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_parameter_counts(depth: int) -> None:
    plain, normed = PUBLISHED[depth]
    assert parameter_counts(MMDiTConfig.from_preset(f"sd3-d{depth}"))[0] == plain
    assert parameter_counts(MMDiTConfig.from_preset(f"sd3-d{depth}-qknorm"))[0] == normed


@pytest.mark.parametrize(
    ("preset", "trained", "with_table"),
    [
        ("sd3-medium", 2_028_328_000, 2_084_951_104),
        ("sd3.5-medium", 2_243_171_520, 2_243_171_520 + 384**2 * 1536),
        ("sd3.5-large", 8_056_627_520, 8_056_627_520 + 192**2 * 2432),
        ("flux-dev", 11_901_408_320, 11_901_408_320),
        ("flux-schnell", 11_891_178_560, 11_891_178_560),
    ],
)
def test_released_models(preset: str, trained: int, with_table: int) -> None:
    assert parameter_counts(MMDiTConfig.from_preset(preset)) == (trained, with_table)


def test_rope_has_no_table() -> None:
    trained, with_table = parameter_counts(MMDiTConfig.from_preset("flux-test"))
    assert trained == with_table


def test_the_demo_is_small() -> None:
    assert 4e6 < parameter_counts(MMDiTConfig.from_preset("mmdit-demo"))[0] < 6e6


def test_sd3_rows_follow_the_papers_rule() -> None:
    for name, row in PRESETS.items():
        if name.startswith("sd3-d"):
            assert (row["width"], row["num_heads"]) == (64 * row["depth"], row["depth"])
            assert row["qk_norm"] == name.endswith("-qknorm")


def test_explicit_keys_win() -> None:
    config = load(MMDiTConfig, overrides=["preset=mmdit-demo", "in_channels=16", "context_dim=99", "qk_norm=false"])
    assert (config.in_channels, config.context_dim, config.qk_norm) == (16, 99, False)
    assert config.depth == PRESETS["mmdit-demo"]["depth"]


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = MMDiTConfig.from_preset("mmdit-demo", in_channels=16)
    (tmp_path / "model.yaml").write_text(dump(config))
    assert load(MMDiTConfig, tmp_path / "model.yaml") == config


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown preset 'sd3-d38-qknom', did you mean 'sd3-d38-qknorm'"):
        resolve({"preset": "sd3-d38-qknom"})
    with pytest.raises(UserError, match="did you mean 'mmdit-demo'"):
        load(MMDiTConfig, overrides=["preset=mmdit-dem"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": 100}, "width 100 is not divisible by num_heads 8"),
        ({"width": 8 * 6, "rope_axes": (3, 3)}, r"even numbers that add up to the head's 6, got \(3, 3\)"),
        ({"rope_axes": (4, 8)}, r"head's 8, got \(4, 8\)"),
        ({"rope_axes": (8,)}, r"two or more even numbers .* got \(8,\)"),
        ({"width": 34, "num_heads": 2}, "sin-cos positions need a width divisible by 4, got 34"),
        ({"image_attention": 3}, "image_attention is 3, the depth 2"),
    ],
)
def test_sizes_that_do_not_fit(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.model_validate({"depth": 2, "width": 64, "num_heads": 8, **keys})
