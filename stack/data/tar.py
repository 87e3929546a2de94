"""The members of a tar, from its headers: POSIX, GNU and pax forms.

Python's tarfile ends silently at a cut between two members, at a broken header, and at the first end marker of several
archives in one file; here the first two are reported, and the members of all archives are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from stack.data.safety import split_name

_BLOCK = HEADER_BYTES = 512  # a tar is made of blocks of so many bytes, and a member's header is one
_ZEROS = bytes(2**20)
_MAX_EXTENDED_HEADER = 2**20  # bytes of a GNU long name or pax header


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    kind: str


class Archive(NamedTuple):
    """members: those that are whole.  damage: what is wrong with the archive, or "".
    complete: whether an end marker follows the last member, so that it is not cut off from further ones."""

    members: list[Member]
    damage: str
    complete: bool


FILE, FOLDER = "file", "folder"
NOT_A_TAR = "not a tar"
"""What the damage of a file begins with that as a whole is of another format."""
_END = Member("", 0, 0, "end marker")
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
_VOLUME_LABEL = b"V"  # GNU's, of the archive itself: no member
_ARCHIVES = "unpack it, and pack its files into a plain .tar"
_OTHER_FORMATS = {  # first bytes → what the file is, and the remedy
    b"\x1f\x8b": "compressed with gzip: unpack it, `gzip -dc FILE > NEW.tar`",
    b"\x1f\x9d": "compressed with compress: unpack it, `gzip -dc FILE > NEW.tar`",
    b"BZh": "compressed with bzip2: unpack it, `bzip2 -dc FILE > NEW.tar`",
    b"\xfd7zXZ\0": "compressed with xz: unpack it, `xz -dc FILE > NEW.tar`",
    b"\x5d\0\0": "compressed with lzma: unpack it, `xz -dc FILE > NEW.tar`",
    b"LZIP": "compressed with lzip: unpack it, `lzip -dc FILE > NEW.tar`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, `zstd -dc FILE > NEW.tar`",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it, `lz4 -dc FILE > NEW.tar`",
    b"PK\x03\x04": f"compressed as zip: {_ARCHIVES}",
    b"PK\x05\x06": f"compressed as zip: {_ARCHIVES}",  # without a member
    b"7z\xbc\xaf\x27\x1c": f"compressed as 7z: {_ARCHIVES}",
    b"Rar!\x1a\x07": f"compressed as rar: {_ARCHIVES}",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
}


class _Damage(ValueError):
    """What is wrong with the archive, in words that follow "shard"."""


def read_headers(file: BinaryIO, size: int) -> Archive:
    """The members of a file of `size` bytes: one tar, or several one behind the other (`cat a.tar b.tar`)."""
    found: list[Member] = []
    damage = _other_format(file)
    try:
        for member in () if damage else _walk(file, size):
            found.append(member)  # not list(): the members before the damage count
    except _Damage as error:
        damage = str(error)
    complete = bool(found) and found[-1] is _END
    return Archive([member for member in found if member is not _END], damage, complete)


def _other_format(file: BinaryIO) -> str:
    """What a file that is no tar is instead, if its first bytes are those of a known format; else ""."""
    file.seek(0)
    head = file.read(_BLOCK)
    try:
        _parse_header(head)
    except (ValueError, IndexError):
        kinds = (kind for magic, kind in _OTHER_FORMATS.items() if head.startswith(magic))
        return next((f"{NOT_A_TAR} but {kind}" for kind in kinds), "")
    return ""


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
    """The members of all archives in the file, and `_END` for each end marker."""

    def read(length: int) -> bytes:
        data = file.read(length)
        if len(data) < length:
            raise _Damage(behind_end or f"truncated at byte {size}")
        return data

    long_name, pax, behind_end = b"", dict[bytes, bytes](), ""
    position = 0
    while True:
        file.seek(position)
        block = read(_BLOCK)
        if not any(block):
            if any(read(_BLOCK)):
                raise _Damage(f"broken: single block of zeros at byte {position}")
            if long_name or pax:
                raise _Damage(f"broken: extended header without a member before byte {position}")
            yield _END
            position = _end_of_zeros(file, position, size)
            if position == size:
                return
            behind_end = f"broken: {size - position:,} bytes behind the end of the archive, from byte {position}"
            continue
        try:
            name, length, kind = _parse_header(block)
            behind_end = ""
            if kind in _EXTENSIONS and length > _MAX_EXTENDED_HEADER:
                raise ValueError(f"extended header of {length} bytes")
            if kind == b"L":
                long_name = read(length).partition(b"\0")[0]
            elif kind == b"x":
                pax = _parse_pax(read(length))
            elif kind not in _EXTENSIONS:
                name = pax.get(b"GNU.sparse.name", pax.get(b"path", long_name or name))
                length = int(pax.get(b"size", length)) if kind not in _WITHOUT_DATA else 0
        except _Damage:
            raise
        except ValueError as error:
            raise _Damage(behind_end or f"broken: bad header at byte {position} ({error})") from None
        behind_end = ""
        offset = position + _BLOCK
        if kind == b"S" and block[482]:  # GNU's sparse file: its map goes on in further blocks
            while read(_BLOCK)[504]:
                offset += _BLOCK
            offset += _BLOCK
        if offset + length > size:
            raise _Damage(f"truncated at byte {size}")
        if kind not in _EXTENSIONS:
            sparse = any(key.startswith(b"GNU.sparse") for key in pax)
            named = "sparse file" if sparse else FOLDER if name.endswith(b"/") else _KINDS.get(kind, "special member")
            if kind != _VOLUME_LABEL:
                yield Member(name.decode("utf-8", "surrogateescape"), offset, length, named)
            long_name, pax = b"", {}
        position = offset + -(-length // _BLOCK) * _BLOCK


def _end_of_zeros(file: BinaryIO, position: int, size: int) -> int:
    """Start of the first block from `position` on that is not all zeros; `size` if there is none."""
    file.seek(position)
    while piece := file.read(len(_ZEROS)):
        if piece != _ZEROS[: len(piece)]:
            at = position + len(piece) - len(piece.lstrip(b"\0"))
            return at - at % _BLOCK
        position += len(piece)
    return size


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
