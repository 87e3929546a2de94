"""CLIP's ids are open_clip's, whichever files hold the table."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from open_clip import SimpleTokenizer

from stack.config import UserError
from stack.text import clip_tokenizer
from stack.text.clean import clean
from stack.text.encoders import TextConfig, TextEncoders, write_clip_tokenizer, write_untrained_encoders

PARTS = [
    "red",
    "STAR",
    "it’s",
    "It's",
    "WE'LL",
    "&amp;",
    "ﬁne",
    "ＦＵＬＬ",
    "e\u0301",
    "👩‍👩‍👧",
    "\u202e",
    "so\u00adft",
    "!",
    "!!",
    "1st",
]
PARTS += [
    "100%",
    "日本語",
    "<|endoftext|>",
    "<|startoftext|>",
    "ß",
    "½",
    "Ⅷ",
    "مرحبا",
    "क्षि",
    "‘x’",
    "$%#",
    "\u00a0",
    "a_b",
    "'ſ",
    "İ",
    "\ufeff",
]
WORD = "".join(random.Random(0).choices("abcdefghijklmnop", k=40_000))


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextConfig]:
    """Both CLIPs by their tokenizers: open_clip's BPE, or transformers' tokenizer.json of several kinds."""
    folder = tmp_path_factory.mktemp("text")
    shipped = write_untrained_encoders(folder / "encoders", seed=0)
    configs = {"shipped": shipped}
    for name in ("own", "old", "other"):
        shutil.copytree(str(shipped.clip_l), folder / name)
        write_clip_tokenizer(folder / name, 0)
        configs[name] = shipped.model_copy(update={"clip_l": str(folder / name)})
    values = json.loads((folder / "own" / "tokenizer.json").read_text(encoding="utf-8"))
    values["normalizer"] = {"type": "NFC"}  # without lower case and words, as early conversions had it
    values["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "old" / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    values["model"]["vocab"]["star</w>"], values["model"]["vocab"]["red</w>"] = 736, 1565
    (folder / "other" / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return configs


def ids(encoders: TextEncoders, name: str, text: str) -> list[int]:
    return encoders._encoders[name].tokenizer.encode(clean(text)).ids


@pytest.mark.parametrize("kind", ["shipped", "own", "old"])
def test_both_clips_have_the_ids_of_open_clip(
    configs: dict[str, TextConfig], reference: SimpleTokenizer, kind: str
) -> None:
    encoders, draws = TextEncoders(configs[kind]), random.Random(0)
    texts = [draws.choice([" ", "", "  "]).join(draws.choices(PARTS, k=draws.randint(0, 30))) for _ in range(2000)]
    for text in [*texts, "a " * 200, "w" * 4000, "é" * 3000]:
        expected = reference.encode(text) if clean(text) else []
        for name in ("clip_l", "clip_g"):
            assert ids(encoders, name, text) == [49406, *expected[:75], 49407], text
    encoded = encoders.encode(["it’s &amp; ﬁne", "it's & fine", "\u200b", ""])
    for one, other in (encoded[:2], encoded[2:]):
        for tensor in ("t5", "clip_l", "clip_g", "pooled"):
            assert torch.equal(getattr(one, tensor), getattr(other, tensor)), tensor


def test_different_tables_are_refused_before_anything_is_encoded(configs: dict[str, TextConfig]) -> None:
    with pytest.raises(UserError, match=r"text.clip_l and text.clip_g have different tokenizers"):
        TextEncoders(configs["other"])
    for harmless in ({"clip_tokens": False}, {"pad": "full"}, {"clip_g": None}):
        TextEncoders(configs["other"].model_copy(update=harmless))


def test_special_tokens_that_a_text_spells_out_are_text(configs: dict[str, TextConfig]) -> None:
    encoders = TextEncoders(configs["own"])
    for name in ("clip_l", "clip_g"):
        found = ids(encoders, name, "a <|endoftext|> b <|startoftext|>")
        assert (found[0], found[-1], len({49406, 49407} & set(found[1:-1]))) == (49406, 49407, 0)


def test_a_word_of_forty_thousand_letters(configs: dict[str, TextConfig], reference: SimpleTokenizer) -> None:
    """open_clip's own loop takes 15 seconds and more for it."""
    encoders, began = TextEncoders(configs["own"]), time.process_time()
    found = [ids(encoders, name, WORD) for name in ("clip_l", "clip_g")]
    cut = encoders.encode([WORD])[0].cut
    assert time.process_time() - began < 3
    clip_tokenizer.speed_up(reference)
    began = time.process_time()
    expected = reference.encode(WORD)
    assert time.process_time() - began < 1
    assert found == [[49406, *expected[:75], 49407]] * 2
    assert cut["clip_l"] == cut["clip_g"] == len(expected) + 2


def test_open_clips_own_tokenizer_keeps_its_ids(reference: SimpleTokenizer) -> None:
    faster, draws = SimpleTokenizer(), random.Random(1)
    clip_tokenizer.speed_up(faster)
    for text in [WORD[:3000], *(" ".join(draws.choices(PARTS, k=20)) for _ in range(300))]:
        assert faster.encode(text) == SimpleTokenizer.encode(reference, text)


def test_what_is_beyond_an_encoders_last_token_is_counted(configs: dict[str, TextConfig]) -> None:
    encoders = TextEncoders(configs["shipped"].model_copy(update={"t5_max_tokens": 6}))
    fits, for_clip, for_none = encoders.encode(["a red star", "a red star above a blue circle", "very " * 100])
    assert (fits.cut, set(for_clip.cut), set(for_none.cut)) == ({}, {"t5"}, {"t5", "clip_l", "clip_g"})
    assert for_none.cut["clip_l"] == for_none.cut["clip_g"] == 102
    whole = TextEncoders(configs["shipped"].model_copy(update={"t5_max_tokens": 500})).encode(["very " * 100])[0]
    assert whole.t5 is not None
    assert for_none.cut["t5"] == len(whole.t5)


def test_a_tokenizer_file_of_the_hub_is_read_by_its_table(tmp_path: Path, reference: SimpleTokenizer) -> None:
    """Under other names of the special tokens, and with a padding token that stands in texts."""
    write_clip_tokenizer(tmp_path, 0)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<|startoftext|>", "<start_of_text>"), encoding="utf-8")
    fast = clip_tokenizer.load(tmp_path)
    assert fast.encode("a red star !").ids == [49406, *reference.encode("a red star !"), 49407]
