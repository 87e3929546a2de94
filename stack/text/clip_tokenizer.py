"""CLIP's byte-pair tokenizer: one way from a cleaned text to ids, whichever files hold its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stack.text import tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # open_clip's


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a CLIP, from the tokenizer.json of `folder`, for texts that `stack.text.clean` has cleaned.

    Only the table and the tokens around a text are used: the files of different versions of transformers normalise and
    split texts in different ways. A tokenizer that is no CLIP BPE is used unchanged. Raises UserError for a file that
    cannot be read.
    """
    fast = tokenizer.load(folder)
    return _as_open_clip(fast) if getattr(fast.model, "end_of_word_suffix", None) == "</w>" else fast


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The same from a table, whose vocabulary has the names of `SPECIAL`."""
    from tokenizers import Tokenizer, models, processors

    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    fast.post_processor = processors.TemplateProcessing(
        single=[SPECIAL[0], "$A", SPECIAL[1]], special_tokens=[(name, vocabulary[name]) for name in SPECIAL]
    )
    return _as_open_clip(fast)


def _as_open_clip(fast: Tokenizer) -> Tokenizer:
    """`fast` with open_clip's way from a cleaned text to words, and so with its ids. Special tokens that a text spells
    out are text."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.encode_special_tokens = True
    return fast


def speed_up(open_clip_tokenizer: Any) -> None:
    """Make open_clip's own tokenizer merge in n·log(n): its loop takes half a minute for a "word" of 40,000 letters."""
    from tokenizers import models

    bpe = models.BPE(
        vocab=open_clip_tokenizer.encoder, merges=list(open_clip_tokenizer.bpe_ranks), end_of_word_suffix="</w>"
    )
    open_clip_tokenizer.bpe = lambda word: " ".join(token.value for token in bpe.tokenize(word))


def same_table(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same tokens under the same ids, whatever those around a text are called."""
    tables = []
    for fast in (one, other):
        around = set(fast.encode("").ids)
        vocabulary = fast.get_vocab(with_added_tokens=False)
        tables.append({token: index for token, index in vocabulary.items() if index not in around})
    return tables[0] == tables[1]
