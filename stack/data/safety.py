"""What may come out of a data file: images, captions, JSON and safetensors, with checked names and image headers.

Nothing here can run code from a shard. Members of other extensions are never read; one that is known to run code when
loaded (a pickle, a Python module) makes its whole sample refused.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from stack.config import UserError
from stack.data import png
from stack.shown import is_redacted, redact
from stack.text.clean import legible

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORBIDDEN_EXTENSIONS = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
MAX_PIXELS = 64 * 2**20
"""Pixels of an image, and bytes of its file, which is read whole; the environment's MMDIT_MAX_PIXELS replaces it."""
MAX_TEXT = 2**20
"""Bytes of a JSON member that is read."""
MAX_CAPTION = 2**16
"""Bytes of a caption. Tokenizers take seconds for more, of which they keep a few hundred."""
MAX_KEY = 4096
"""Bytes of a sample's key: those of a path on Linux."""
EMPTY_CAPTION = "empty caption"
"""What a caption without a visible character is rejected for."""
MAX_SAID = 300


class DecodeError(ValueError):
    """The bytes of a member are not what its extension says, or are broken, or are larger than allowed."""


class EmptyCaptionError(DecodeError):
    """There is no caption, or no visible character in it."""


class TooLarge(DecodeError):
    """An image above `max_pixels`, which would have to be `needed`."""

    def __init__(self, problem: str, needed: int) -> None:
        super().__init__(f"image too large: {problem} (MMDIT_MAX_PIXELS is {max_pixels():,})")
        self.needed = needed


class Rejected(NamedTuple):
    """A sample that is left out. `reason` is `kind` or `kind: detail`."""

    key: str
    reason: str


def cut(text: str) -> str:
    """`text` as far as it is kept of a rejected sample's key and reason: a name in an archive may have megabytes. Long
    keys often begin alike, so of both ends half is kept."""
    return text if len(text) <= MAX_SAID else f"{text[: MAX_SAID // 2]}…{text[1 - MAX_SAID // 2 :]}"


def entry(shard: str, key: str, reason: str) -> dict[str, str]:
    """A line of rejected.jsonl."""
    return {"shard": shard, "key": cut(key), "reason": cut(reason)}


def kinds_of(broken: Iterable[Rejected]) -> Counter[str]:
    """Broken samples by the kind of their reason."""
    return Counter(rejected.reason.partition(":")[0] for rejected in broken)


def check_kinds(kinds: Counter[str], total: int, most: float) -> None:
    """UserError where more than a share of `most` of `total` samples is broken. kinds: kind of reason → samples."""
    if kinds.total() > most * total:
        raise over_budget(kinds, total, most)


def over_budget(kinds: Counter[str], total: int, most: float) -> UserError:
    """The error of `check_kinds`."""
    named = ", ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common(3))
    return UserError(
        f"data: {kinds.total():,} of {total:,} samples are broken ({named}), more than max_rejected = {most:g}: "
        "look at them with `mmdit data lint`, mend the shards or raise max_rejected"
    )


class RejectLog:
    """The broken samples that all processes of a run have met: `{"shard", "key", "reason"}` lines of `path`
    (rejected.jsonl). Without a path, those that this process has met.

    The file appears with the first rejected sample. Lines are written in append mode, so processes may share it; a
    sample that two meet at once may have two lines and counts once. Memory holds no more than a hash of each sample.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.kinds: Counter[str] = Counter()
        """Distinct broken samples by kind, as of the last new sample that this process has added."""
        self._seen: set[int] = set()
        self._unwritten: list[str] = []
        """Lines that could not be written yet."""
        self._read = 0
        """Bytes of the file."""

    def add(self, shard: str, key: str, reason: str) -> bool:
        """Whether the sample is new: no process has listed it yet."""
        return bool(self.add_all([entry(shard, key, reason)]))

    def add_all(self, entries: Iterable[dict[str, str]]) -> list[dict[str, str]]:
        """List those of `entries` that are new; these."""
        new = [line for line in entries if _hash(line) not in self._seen]
        if new:
            self.read()
            new = [line for line in new if _hash(line) not in self._seen]
        for line in new:
            self._note(line)
        if new and self.path is not None:
            self._write(self.path, [json.dumps(line) + "\n" for line in new])
            self.read()  # of processes that add at the same time, the last one has the lines of all
        return new

    def _write(self, path: Path, lines: list[str]) -> None:
        """Append the lines, after those that could not be written before. An error of the file system ends nothing."""
        from stack.log import say

        after_error = "\n" if self._unwritten else ""  # part of a line may be there
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(after_error + "".join([*self._unwritten, *lines]))
            self._unwritten.clear()
        except OSError as error:
            if not self._unwritten:
                say(f"{path} cannot be written ({error}): its lines are kept and written later")
            self._unwritten += lines

    def read(self) -> None:
        """Take in what was added to the file since. Nothing, if it cannot be read now."""
        with suppress(OSError):
            self._take_in()

    def _take_in(self) -> None:
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._read += len(line)
                try:
                    self._note(json.loads(line))
                except (
                    ValueError,
                    KeyError,
                    TypeError,
                    AttributeError,
                    RecursionError,
                ):  # a killed process's, or damage
                    continue

    def clear(self) -> None:
        """Begin anew, without a file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.kinds, self._seen, self._unwritten, self._read = Counter(), set(), [], 0

    def _note(self, line: dict[str, str]) -> None:
        if not all(isinstance(line[name], str) for name in ("shard", "key", "reason")):
            raise TypeError(line)
        kind, number = line["reason"].partition(":")[0], _hash(line)
        if number not in self._seen:
            self._seen.add(number)
            self.kinds[kind] += 1


def _hash(line: dict[str, str]) -> int:
    named = json.dumps([line["shard"], line["key"]]).encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def check_source(source: str) -> None:
    """Raise UserError if `source`, a path or URL of shards, asks for a pipe, a chained URL or shell expansion."""
    shown = repr(redact(source))
    if is_redacted(source):
        raise UserError(f"{shown}: passwords and queries of URLs are not saved; give the URL again as an override")
    if source.startswith("pipe:"):
        raise UserError(f"{shown}: pipe: runs a shell and is refused; name a file, a folder or a URL")
    for token in ("::", "${", "$(", "`"):
        if token in source:
            raise UserError(f"{shown}: {token!r} is not expanded here; write the path or URL out")


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's convention: the key runs to the first dot of the base name, the rest in lower case is the extension.

    >>> split_name("cats/0001.seg.PNG")
    ('cats/0001', 'seg.png')
    """
    folder, slash, base = re.sub(r"^(\./+)+", "", name).rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def refuse_name(name: str) -> str:
    """Why a member of this name is refused, or "" if its name is harmless.

    A harmless name may be in any script, with spaces, line ends or bytes that are not UTF-8: it is never a path here.
    """
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or ".." in parts or re.fullmatch(r"[A-Za-z]:", parts[0]):
        return "path outside the archive"
    if "\0" in name:  # where a tar's plain header ends a name
        return "bad name: it has a NUL"
    if len(split_name(name)[0].encode("utf-8", "surrogateescape")) > MAX_KEY:
        return f"bad name: its key has more than {MAX_KEY:,} bytes"
    extension = re.sub(r"(\.gz)+$", "", name.lower()).rpartition(".")[2]  # webdataset unpacks .pkl.gz and runs it
    return f"forbidden member: .{extension} can run code" if extension in FORBIDDEN_EXTENSIONS else ""


def max_pixels() -> int:
    """Most pixels of an image, and most bytes of its file. An environment variable, so that all processes of a job
    share it: a sample that one of them left out would change the batches of the others. Raises UserError."""
    value = os.environ.get("MMDIT_MAX_PIXELS", MAX_PIXELS)
    try:
        if (most := int(value)) > 0:
            return most
    except ValueError:
        pass
    raise UserError(f"MMDIT_MAX_PIXELS: {value!r} is not a positive integer")


def open_image(data: bytes | IO[bytes], pixels: bool = True) -> Image.Image:
    """Read the header of an image, given as bytes or as an open file. Its pixels can be loaded if `pixels` is true.

    Raises DecodeError on another format than JPEG, PNG or WebP, whatever the extension says, and above `max_pixels`
    (Pillow only warns up to twice its own limit).
    """
    most = max_pixels()
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, most)  # refused by Pillow from twice as many on
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        is_png = file.read(len(png.MAGIC)) == png.MAGIC
        file.seek(0)
        image = png.open_png(file, pixels) if is_png else Image.open(file, formats=("JPEG", "WEBP"))
    except png.DamagedError as error:
        raise DecodeError(f"image not {'decodable' if pixels else 'readable'}: {error}") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on hostile bytes
        raise DecodeError(f"image not readable: {_say(error)}") from error
    if image.width * image.height > most:
        raise TooLarge(f"{image.width}×{image.height} pixels", image.width * image.height)
    return image


def read_caption(data: bytes) -> str:
    """The caption in a .txt member, as `check_caption` returns it. Raises what that raises, and DecodeError for bytes
    that are no text."""
    if len(data) > MAX_CAPTION:
        raise DecodeError(f"caption too large: more than {MAX_CAPTION:,} bytes")
    try:
        return check_caption(decode_text(data))
    except UnicodeDecodeError as error:
        raise DecodeError(f"caption not UTF-8: {error.reason}") from None


def decode_text(data: bytes) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as Windows' Notepad saves one. Raises UnicodeDecodeError."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig")


def check_caption(text: str) -> str:
    """`text` without control characters, stripped (see `legible`).

    Raises DecodeError if it is too large or holds half a character, EmptyCaptionError if nothing of it is visible.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION:
        raise DecodeError(f"caption too large: more than {MAX_CAPTION:,} bytes")
    try:
        caption = legible(text)
    except ValueError as error:
        raise DecodeError(f"caption not UTF-8: {error}") from None
    if not caption:
        raise EmptyCaptionError(EMPTY_CAPTION)
    return caption


def _say(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x…>" would differ from run to run.
    return re.sub(r" <_io\.\w+.*?>", "", " ".join(str(error).split())) or type(error).__name__
