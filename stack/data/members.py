"""Which members of a shard belong to one sample, and which to none."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from stack.data import mlperf, safety
from stack.data.tar import FILE, FOLDER, Member

READ = frozenset({*safety.IMAGE_EXTENSIONS, "txt", "json", "safetensors", *mlperf.EXTENSIONS})
"""Extensions of the members that anything here reads."""
MAX_MEMBER = 2**32 - 2
"""Bytes of a member that an index can hold."""
_CONTENT = READ - {"txt", "json"}  # what a sample is made of; text may belong to it
_OTHER_TYPES = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "ppm", "tif", "tiff")
_IMAGE_TYPES = frozenset((*safety.IMAGE_EXTENSIONS, *_OTHER_TYPES))
_DOCUMENT = re.compile(
    "authors|captions|categories|changelog|citation|classes|copying|copyright|credits|data|dataset_infos?|desktop|index|"
    "info|labels|licen[cs]e|manifest|metadata|notice|readme|source|stats|thumbs|urls",
    re.IGNORECASE,
)
"""Keys of files that are about the whole shard."""


class Grouped(NamedTuple):
    groups: dict[str, dict[str, Member]]
    """key → extension → member, in the order of the first members."""
    rejected: dict[str, str]
    """key → reason, of the groups that must not be used."""
    strays: list[str]
    """Names of the files that belong to no sample."""


def group(members: list[Member]) -> Grouped:
    """The samples of a shard. Files that belong to no sample have no effect on any."""
    files = [(*safety.split_name(member.name), member) for member in members if member.kind != FOLDER]
    extensions: dict[str, set[str]] = {}
    for key, extension, _ in files:
        if extension and key and not key.endswith("/"):  # else it has no key, as hidden files have none
            extensions.setdefault(key, set()).add(extension)
    strays = _strays(extensions)
    found = Grouped({}, {}, [])
    previous = None
    for key, extension, member in files:
        refusal = safety.refuse_name(member.name)
        if key not in extensions or (key in strays and not refusal):
            found.strays.append(member.name)
            continue
        apart = key in found.groups and key != previous
        own = found.groups.setdefault(key, {})
        if apart:
            reason = f"interleaved key: {member.name} stands apart from the rest of its sample"
        else:
            reason = refusal or (_fault(member, extension in own) if extension in _CONTENT else "")
        if reason:
            found.rejected.setdefault(key, reason)
        if extension in own:  # which of the two is meant concerns those who read it
            own[extension] = own[extension]._replace(kind="duplicate")
        own.setdefault(extension, member)
        previous = key
    return found


def _fault(member: Member, is_repeated: bool) -> str:
    """What is wrong with a member that a sample is made of, or ""."""
    if member.kind != FILE:
        return f"forbidden member: {member.name} is a {member.kind}"
    if is_repeated:
        return f"duplicate member: {member.name}"
    return f"member too large: {member.name} has {member.size:,} bytes" if member.size > MAX_MEMBER else ""


def further_images(groups: list[dict[str, Member]]) -> Counter[tuple[str, str]]:
    """Count the samples with several images: (extension that is read, extension that is not) → samples."""
    found = Counter[tuple[str, str]]()
    for own in groups:
        read = next((extension for extension in safety.IMAGE_EXTENSIONS if extension in own), None)
        if read is not None and not own.keys() & (_CONTENT - set(safety.IMAGE_EXTENSIONS)):
            found.update((read, other) for other in sorted(own) if other != read and _is_image(other))
    return found


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGE_TYPES


def _strays(extensions: dict[str, set[str]]) -> set[str]:
    """Keys that are no sample's.

    A group without image or latent is either a sample that lost its image (or has one of a type that is not read), or a
    file about the whole shard, such as a README. It is taken for a sample if it has an extension that samples have, and
    is not named like a document: by a usual name, or by one without a digit where each sample's has one.
    """
    whole = [key for key, own in extensions.items() if own & _CONTENT]
    usual = {"txt", "json"}.union(*(extensions[key] for key in whole))
    numbered = bool(whole) and all(map(_has_digit, whole))

    def is_sample(key: str, own: set[str]) -> bool:
        if own & _CONTENT or any(map(_is_image, own)):
            return True
        if whole and not own & usual:
            return False
        return not _DOCUMENT.fullmatch(_base(key)) and (_has_digit(key) or not numbered)

    return {key for key, own in extensions.items() if not is_sample(key, own)}


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _has_digit(key: str) -> bool:
    return any(character.isdigit() for character in _base(key))
