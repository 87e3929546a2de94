"""What may come out of a data file: images, captions, JSON and safetensors, with checked names and image headers.

Nothing here can run code from a shard. Members of other extensions are never read; one that is known to run code when
loaded (a pickle, a Python module) makes its whole sample refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from stack.config import UserError
from stack.shown import is_redacted, redact

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORBIDDEN_EXTENSIONS = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
MAX_PIXELS = 64 * 2**20
MAX_IMAGE = 64 * 2**20
"""Bytes of an image file, which is read whole."""
MAX_TEXT = 2**20
"""Bytes of a JSON member that is read."""
MAX_CAPTION = 2**16
"""Bytes of a caption. Tokenizers take seconds for more, of which they keep a few hundred."""
MAX_SAID = 300
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


class DecodeError(ValueError):
    """The bytes of a member are not what its extension says, or are broken, or are larger than allowed."""


class Rejected(NamedTuple):
    """A sample that is left out. `reason` is `kind` or `kind: detail`."""

    key: str
    reason: str


def cut(text: str) -> str:
    """`text` as far as it is kept of a rejected sample's key and reason: a name in an archive may have megabytes."""
    return text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…"


def entry(shard: str, key: str, reason: str) -> dict[str, str]:
    """A line of rejected.jsonl."""
    return {"shard": shard, "key": cut(key), "reason": cut(reason)}


def kinds_of(broken: Iterable[Rejected]) -> Counter[str]:
    """Broken samples by the kind of their reason."""
    return Counter(rejected.reason.partition(":")[0] for rejected in broken)


def check_budget(broken: Collection[Rejected], total: int, most: float) -> None:
    """UserError where more than a share of `most` of `total` samples is broken."""
    check_kinds(kinds_of(broken), total, most)


def check_kinds(kinds: Counter[str], total: int, most: float) -> None:
    """As `check_budget`, for the numbers of broken samples by kind."""
    if kinds.total() > most * total:
        named = ", ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common(3))
        raise UserError(
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
        if new and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(json.dumps(line) + "\n" for line in new).encode())
            self.read()  # of processes that add at the same time, the last one has the lines of all
        for line in new if self.path is None else ():
            self._note(line)
        return new

    def read(self) -> None:
        """Take in what was added to the file since."""
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
        self.kinds, self._seen, self._read = Counter(), set(), 0

    def _note(self, line: dict[str, str]) -> None:
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
    """Why a member of this name is refused, or "" if its name is harmless."""
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or ".." in parts or re.fullmatch(r"[A-Za-z]:", parts[0]):
        return "path outside the archive"
    extension = re.sub(r"(\.gz)+$", "", name.lower()).rpartition(".")[2]  # webdataset unpacks .pkl.gz and runs it
    return f"forbidden member: .{extension} can run code" if extension in FORBIDDEN_EXTENSIONS else ""


def open_image(data: bytes | IO[bytes]) -> Image.Image:
    """Read the header of an image, given as bytes or as an open file, not its pixels.

    Raises DecodeError on another format than JPEG, PNG or WebP, whatever the extension says, and above `MAX_PIXELS`
    (Pillow only warns up to 179 megapixels).
    """
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_IMAGE_FORMATS)
    except Exception as error:  # Pillow's plugins raise nearly anything on hostile bytes
        raise DecodeError(f"image not readable: {_say(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"image too large: {image.width}×{image.height} pixels")
    return image


def read_caption(data: bytes) -> str:
    """The caption in a .txt member, stripped. Raises DecodeError if it is empty, too large or not UTF-8."""
    if len(data) > MAX_CAPTION:
        raise DecodeError(f"caption too large: more than {MAX_CAPTION:,} bytes")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"caption not UTF-8: {error.reason}") from None
    if not caption:
        raise DecodeError("empty caption")
    return caption


def _say(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x…>" would differ from run to run.
    return re.sub(r" <_io\.\w+.*?>", "", " ".join(str(error).split())) or type(error).__name__
