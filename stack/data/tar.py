"""The members of a tar, from its headers: POSIX, GNU and pax forms.

Python's tarfile ends silently at a cut between two members and at a broken header; here both are reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from stack.data.safety import split_name

_BLOCK = HEADER_BYTES = 512  # a tar is made of blocks of so many bytes, and a member's header is one
_MAX_EXTENDED_HEADER = 2**20  # bytes of a GNU long name or pax header


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    kind: str


FILE, FOLDER = "file", "folder"
_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"5": FOLDER,
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever their size field says
_EXTENSIONS = (b"L", b"K", b"x", b"g")  # GNU long name and long link, pax for the next member and for all


class _Damage(ValueError):
    """What is wrong with the archive, in words that follow "shard"."""


def read_headers(file: BinaryIO, size: int) -> tuple[list[Member], str]:
    """The members that stand whole in a tar of `size` bytes, and what is wrong with the archive, or ""."""
    members: list[Member] = []
    try:
        for member in _walk(file, size):
            members.append(member)  # not list(): the members before the damage count
    except _Damage as damage:
        return members, str(damage)
    return members, ""


def is_header_of(block: bytes, key: str, extension: str, size: int) -> bool:
    """Whether `block` is the header of this member, as far as it can tell: a long name, one that is not ASCII and a
    large size stand in an extended header before it."""
    try:
        name, length, _ = _parse_header(block)
    except (ValueError, IndexError):
        return False
    if length not in (size, 0):
        return False
    extended = len(key) + len(extension) > 90 or not (key + extension).isascii()
    return extended or split_name(name.decode("utf-8", "surrogateescape")) == (key, extension)


def _walk(file: BinaryIO, size: int) -> Iterator[Member]:
    def read(length: int) -> bytes:
        data = file.read(length)
        if len(data) < length:
            raise _Damage(f"truncated at byte {size}")
        return data

    long_name, pax = b"", dict[bytes, bytes]()
    position = 0
    while True:
        file.seek(position)
        block = read(_BLOCK)
        if not any(block):
            if any(read(_BLOCK)):
                raise _Damage(f"broken: single block of zeros at byte {position}")
            return
        try:
            name, length, kind = _parse_header(block)
            if kind in _EXTENSIONS and length > _MAX_EXTENDED_HEADER:
                raise ValueError(f"extended header of {length} bytes")
            if kind == b"L":
                long_name = read(length).partition(b"\0")[0]
            elif kind == b"x":
                pax = _parse_pax(read(length))
            elif kind not in _EXTENSIONS:
                name = pax.get(b"path", long_name or name)
                length = int(pax.get(b"size", length)) if kind not in _WITHOUT_DATA else 0
        except _Damage:
            raise
        except ValueError as error:
            raise _Damage(f"broken: bad header at byte {position} ({error})") from None
        offset = position + _BLOCK
        if offset + length > size:
            raise _Damage(f"truncated at byte {size}")
        if kind not in _EXTENSIONS:
            sparse = any(key.startswith(b"GNU.sparse") for key in pax)
            named = "sparse file" if sparse else FOLDER if name.endswith(b"/") else _KINDS.get(kind, "special member")
            yield Member(name.decode("utf-8", "surrogateescape"), offset, length, named)
            long_name, pax = b"", {}
        position = offset + -(-length // _BLOCK) * _BLOCK


def _parse_header(block: bytes) -> tuple[bytes, int, bytes]:
    """(name, bytes of data, type flag). Raises ValueError on a wrong check sum or number."""
    if _parse_number(block[148:156]) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise ValueError("wrong check sum")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name, _parse_number(block[124:136]), block[156:157]


def _parse_number(field: bytes) -> int:
    """An octal number, or GNU's big-endian binary one, marked by 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+", digits):
        raise ValueError(f"not a number: {digits!r}")
    return int(digits, 8)


def _parse_pax(payload: bytes) -> dict[bytes, bytes]:
    """Records of the form "LENGTH KEY=VALUE\\n", LENGTH counting the whole record."""
    records, start = {}, 0
    while start < len(payload):
        match = re.compile(rb"(\d{1,9}) ([^=]+)=").match(payload, start)
        if match is None or int(match[1]) <= match.end() - start:
            raise ValueError("bad pax record")
        stop = start + int(match[1])
        records[match[2]] = payload[match.end() : stop - 1]
        start = stop
    if not records.get(b"size", b"0").isdigit():
        raise ValueError("bad pax size")
    return records
