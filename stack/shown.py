"""What may be shown, logged or saved: text without the secrets of URLs, and without what moves a terminal's cursor."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any


def redact(text: str) -> str:
    """`text` without the user names, passwords and query strings of its URLs.

    >>> redact("https://user:pw@host/a.tar?X-Amz-Signature=abc is gone")
    'https://***@host/a.tar?*** is gone'
    """
    # A password with a slash or question mark in it breaks the URL, but is one all the same.
    text = re.sub(rf"({_SCHEME})(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d{{0,5}}(?:[/?#\s]|$))\S*)@", r"\1***@", text)
    # A query may hold any character but white space, so quotes and brackets right behind it are lost with it.
    return re.sub(rf"({_SCHEME}[^\s?]*\?)(?!\*\*\*)\S+?(?=[:;,.]?(?:\s|$))", r"\1***", text)


_SCHEME = r"(?:://|(?<=[A-Za-z0-9+.-]{2}):/)(?!/)"
"""How a URL goes on behind its scheme; with one slash where it went through pathlib."""


def redacted(values: Any) -> Any:
    """The same of every text in JSON-able `values`, keys included."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, list):
        return [redacted(value) for value in values]
    if not isinstance(values, dict):
        return values
    found: dict[str, Any] = {}
    for key, value in values.items():
        shown = redact(str(key))
        while shown in found:  # two URLs that differ in their queries alone
            shown += "*"
        found[shown] = redacted(value)
    return found


def is_redacted(text: str) -> bool:
    """Whether `text` is a URL of which `redact` has taken something away."""
    return ":/***@" in text or "://***@" in text or "?***" in text


def command_line(words: Sequence[str]) -> str:
    """`words` as a shell reads them, on one line and without the secrets of URLs."""
    return printable(shlex.join(map(redact, words)))


def printable(text: str) -> str:
    """`text` with all that ends a line, moves the cursor or is no character as an escape: \\n, \\x1b, \\udcff."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":  # for slurm/job.sh
    print(command_line(sys.argv[1:]))
