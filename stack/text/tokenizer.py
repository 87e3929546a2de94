"""A small T5-style tokenizer: Unigram pieces (Kudo 2018, arXiv 1804.10959), bytes where none fits, </s> at the end."""

from __future__ import annotations

import json
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stack.config import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CAPTION_TOKENIZER = Path(__file__).resolve().parents[2] / "tokenizers" / "t5-small-captions"

_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0, 1, 2, as in T5
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ALPHABET = sorted(
    {c for c in string.printable.lower() if not c.isspace()} | {chr(c) for c in range(0xDF, 0x100)} | set("–—‘’“”…")
)


def pictograph_names() -> Iterator[str]:
    """Lower-case names of arrows, symbols and emoji, from the Unicode tables that come with Python."""
    for start, stop in ((0x2190, 0x2200), (0x2300, 0x2400), (0x2500, 0x27C0), (0x2B00, 0x2C00), (0x1F000, 0x1FB00)):
        for code in range(start, stop):
            if name := unicodedata.name(chr(code), ""):
                yield name.lower()


def train(captions: Iterable[str], folder: str | Path, vocab_size: int) -> Tokenizer:
    """Train on `captions` and write the files that `load` and transformers' AutoTokenizer read into `folder`.

    The same captions give the same bytes. Captions are NFKC-normalised and lower-cased. `vocab_size` is the most that
    special tokens, single characters, the pieces, the commonest words and 256 bytes may come to; less where the
    captions have less. Raises UserError where it leaves no room for pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = list(_SPECIAL.values())
    room = vocab_size - len(special) - len(_ALPHABET) - len(_BYTES)
    if room < 2:
        raise UserError(f"vocab_size {vocab_size} leaves no room for pieces, take {vocab_size - room + 2} or more")

    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    word_counts: Counter[str] = Counter()
    for caption in captions:
        word_counts.update(word for word, _ in metaspace.pre_tokenize_str(normalizer.normalize_str(caption)))

    # The trainer draws its pieces from the distinct words, each taken once, so that no whole word is ever among them:
    # the commonest words come in by themselves. Its threads add in any order, hence the rounding.
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = metaspace
    words = (word.removeprefix("▁") for word in word_counts.elements())
    learner.train_from_iterator(words, trainers.UnigramTrainer(vocab_size=room // 2, show_progress=False))
    scores = {piece: round(score, 4) for piece, score in json.loads(learner.to_str())["model"]["vocab"]}
    rarest = min(scores.values()) - 1
    scores = dict.fromkeys(_ALPHABET, rarest) | scores
    for word, count in sorted(word_counts.items(), key=lambda item: (-item[1], item[0])):
        if len(scores) < room + len(_ALPHABET) and count > 1:
            scores[word] = round(math.log(count / word_counts.total()), 4)

    vocab = [(token, 0.0) for token in special]
    vocab += sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    vocab += [(byte, rarest - 1) for byte in _BYTES]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=special.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, metaspace
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(special)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **_SPECIAL}
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", _SPECIAL)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def load(folder: str | Path) -> Tokenizer:
    """The fast tokenizer of `folder` (its tokenizer.json). Raises UserError naming a file that is missing or broken."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    data = file.read_bytes()
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the bindings raise bare Exception for a file they can't parse
        raise UserError(f"{file}: cannot be read as a tokenizer: {error}") from None
