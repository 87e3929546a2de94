"""The text that encoders read: open_clip's cleaning, and which captions are empty."""

from __future__ import annotations

import time

import pytest
from open_clip.tokenizer import basic_clean, whitespace_clean

from stack.data.safety import DecodeError, EmptyCaptionError, read_caption
from stack.text.clean import clean, legible

TEXTS = [
    "a small yellow square at the left, on a grey background",
    "it’s “so” ‘good’ …",
    "ﬁne ﬂowers in ＦＵＬＬ width",
    "cafe\u0301 réunion",
    "fish &amp; chips &amp;amp; peas &lt;b&gt; &rsquo;",
    "&copy 2020 <b>&amp;</b>",
    "Ã©tÃ© â€œmojibakeâ€\x9d \x93quoted\x94",
    "two  spaces\tand\r\nlines\u2028of\u00a0text",
    "\ufeffa mark",
    "a\0b\x1b[31mred\x1b[0m\x7f",
    "👩‍👩‍👧‍👦 ❤️ 🇩🇪",
    "\u202eright to left\u202c soft\u00adhyphen zero\u200bwidth",
    "日本語 مرحبا ΟΔΟΣ İstanbul",
    "",
]
INVISIBLE = [
    "",
    " \n",
    "\ufeff",
    "\u200b\u200d",
    "\0\x01\x1b",
    "\x1b[0m",
    "&nbsp;",
    "&amp;#8203;",
    "\u00ad\u2060\u200f",
]
INVISIBLE += ["\ufe0f", "\u3164", "\u2800\u00a0\u3000"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cleaned_as_open_clip_does(text: str) -> None:
    assert clean(text) == whitespace_clean(basic_clean(text))


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_caption_without_a_visible_character_is_empty(text: str) -> None:
    assert legible(text) == clean(text) == ""
    with pytest.raises(EmptyCaptionError):
        read_caption(text.encode())


def test_a_caption_is_kept_as_it_was_written_but_for_control_characters() -> None:
    for text in ("it’s", "two  spaces", "&amp;", "👩‍👩‍👧‍👦", "a\nb", "…", "\u0301", "\ue000"):
        assert read_caption(f" {text}\n".encode()) == text
    assert read_caption(b"\xef\xbb\xbfa red\0 star\x07\r\n") == "a red star"
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
        assert read_caption((mark + "a réd star").encode(encoding)) == "a réd star"


def test_half_a_character_is_refused() -> None:
    for text in ("a \ud800 b", "\udc80"):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            clean(text)
        with pytest.raises(DecodeError, match="caption not UTF-8"):
            read_caption(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DecodeError, match="caption not UTF-8"):
        read_caption("naïve".encode("latin-1"))


@pytest.mark.parametrize("escape", ["amp;", "AMP;", "#38;", "#x26;"])
def test_an_ampersand_that_was_escaped_thousands_of_times(escape: str) -> None:
    """ftfy takes one escape per pass: half a minute for what a caption may have."""
    began = time.process_time()
    assert clean("&" + escape * (60_000 // len(escape)) + "lt;3") == "<3"
    assert time.process_time() - began < 2
