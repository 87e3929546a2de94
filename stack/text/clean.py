"""What text encoders read of a caption or prompt: one rule for all encoders, before any tokenizer."""

from __future__ import annotations

import html
import re
import unicodedata

_NO_TEXT = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})  # categories of characters that draw nothing
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")  # fillers of other categories
_NESTED = re.compile(r"&(?:(?:amp|#0*38|#x0*26);)+", re.IGNORECASE)


def legible(text: str) -> str:
    """`text` without terminal escapes and control characters, stripped; "" if no visible character is left.

    Control characters are those that ftfy removes: NUL and most others of ASCII, U+FEFF (the byte order mark), and a
    few that mark up text. Joiners and marks of direction are kept. Raises ValueError for half of a surrogate pair,
    which UTF-8 cannot hold.
    """
    from ftfy import fixes

    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"U+{ord(half[0]):04X} is half of a surrogate pair")
    text = fixes.remove_control_chars(fixes.remove_terminal_escapes(text)).strip()
    return text if any(map(_visible, html.unescape(html.unescape(text)))) else ""


def _visible(character: str) -> bool:
    return not (
        unicodedata.category(character) in _NO_TEXT
        or character in _BLANK
        or "\u180b" <= character <= "\u180f"  # variation selectors
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def clean(text: str) -> str:
    """Clean `text` for all encoders, as open_clip does, with which both CLIPs were trained, but keep capitals.

    HTML entities, text in a wrong encoding, curly quotes, ligatures and full-width letters are replaced (ftfy), letters
    with accents are composed (NFC), and white space becomes single spaces. Wan's pipeline cleans texts for T5 in the
    same way. Raises ValueError as `legible`.
    """
    import ftfy

    text = _NESTED.sub("&amp;", legible(text))  # ftfy removes one level of escapes per pass over the text
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
