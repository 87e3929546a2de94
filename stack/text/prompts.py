"""Prompts: read and checked before any model is loaded, so that a bad one ends the command at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack.config import UserError
from stack.data.safety import MAX_CAPTION, decode_text
from stack.log import say
from stack.text.clean import legible

if TYPE_CHECKING:
    from stack.text.conditioning import EncodedText
    from stack.text.encoders import TextEncoders

_SHOWN = 60  # characters of a prompt in a message


def read(path: Path) -> list[str]:
    """The prompts of a text file, one per line, without empty lines. Raises UserError if it has none or a bad one."""
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8") from None
    prompts = [line for line in map(legible, re.split(r"\r\n|\r|\n", text)) if line]
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    check(prompts, f"{path}: ")
    return prompts


def check(prompts: Sequence[str], source: str = "") -> None:
    """Raises UserError, which begins with `source`, for a prompt that no encoder can read. An empty one can be read."""
    for number, prompt in enumerate(prompts, 1):
        try:
            size = len(legible(prompt).encode())
        except ValueError as error:
            raise UserError(f"{source}prompt {number} is not UTF-8: {error}") from None
        if size > MAX_CAPTION:
            raise UserError(f"{source}prompt {number} has {size:,} bytes, more than {MAX_CAPTION:,}")


def encode(prompts: Sequence[str], encoders: TextEncoders) -> list[EncodedText]:
    """The encoded prompts. The log names each prompt of which the encoders read only the beginning."""
    texts = encoders.encode(prompts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        shown = prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN] + "…"
        for name, tokens in text.cut.items():
            most = encoders.max_tokens[name]
            say(f"prompt {number} was cut: {name} reads the first {most} of its {tokens:,} tokens: {shown!r}")
    return texts
