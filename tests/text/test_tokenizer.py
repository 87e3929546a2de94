from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from stack.config import UserError
from stack.text import tokenizer

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT.parent / "shared" / "data" / "emoji"

CAPTIONS = [
    "a small red star at the left of a large blue circle",
    "Grinning Face with smiling eyes",
    "",
    "  two   spaces\tand a tab ",
]


def test_import_of_tokenizers_from_the_root_is_the_pypi_package() -> None:
    command = [sys.executable, "-c", "import sys, tokenizers; print(sys.path[0] == '', tokenizers.__file__)"]
    at_root, file = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert at_root == "True"
    assert "site-packages" in file
    assert not list((ROOT / "tokenizers").rglob("*.py"))


def test_shipped_tokenizer_keeps_t5_conventions() -> None:
    fast = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    assert [fast.id_to_token(index) for index in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert fast.encode("").ids == [1]
    assert fast.encode("a red star").ids[-1] == 1
    assert fast.encode("a red star").tokens == ["▁a", "▁red", "▁star", "</s>"]
    assert fast.encode("  A RED\tstar ").ids == fast.encode("a red star").ids
    assert fast.decode(fast.encode("a red star").ids) == "a red star"


def test_unknown_characters_become_bytes() -> None:
    encoding = tokenizer.load(tokenizer.CAPTION_TOKENIZER).encode("red 火")
    assert encoding.tokens == ["▁red", "▁", "<0xE7>", "<0x81>", "<0xAB>", "</s>"]
    assert tokenizer.load(tokenizer.CAPTION_TOKENIZER).decode(encoding.ids) == "red 火"


def test_transformers_reads_the_same_ids() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.CAPTION_TOKENIZER, local_files_only=True)
    ours = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    assert theirs(CAPTIONS)["input_ids"] == [ours.encode(caption).ids for caption in CAPTIONS]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)


def test_words_of_drawn_scenes_are_single_tokens() -> None:
    from stack.data import synthetic

    fast = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    words = {word for index in range(500) for word in synthetic.make_sample(synthetic.SynthConfig(), index)[1].split()}
    assert {*synthetic.COLOURS, *synthetic.OUTLINES} <= words
    assert [word for word in sorted(words) if len(fast.encode(word).ids) != 2] == []


def test_emoji_captions_need_neither_bytes_nor_unk() -> None:
    if not EMOJI.is_dir():
        pytest.skip(f"{EMOJI} is not here")
    captions = []
    for shard in sorted(EMOJI.glob("*.tar")):
        with tarfile.open(shard) as tar:
            texts = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
            captions += [text.read().decode() for text in texts if text is not None]
    encodings = tokenizer.load(tokenizer.CAPTION_TOKENIZER).encode_batch(captions)
    assert len(captions) == 3786
    assert not [e.tokens for e in encodings if any(t == "<unk>" or t.startswith("<0x") for t in e.tokens)]
    assert sum(len(e.ids) for e in encodings) / len(encodings) < 12


def test_training_is_reproducible_whatever_the_threads(tmp_path: Path) -> None:
    code = "import sys; from stack.text import tokenizer as t; t.train(t.pictograph_names(), sys.argv[1], 1200)"
    hashes = []
    for threads in ("1", "4"):
        folder = tmp_path / threads
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment, check=True)
        hashes.append(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    fast = tokenizer.load(folder)
    assert 1000 < fast.get_vocab_size() <= 1200
    assert "<unk>" not in fast.encode("smiling face, Ωμέγα ☃").tokens


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocab_size 300 leaves no room"):
        tokenizer.train(CAPTIONS, tmp_path, 300)
