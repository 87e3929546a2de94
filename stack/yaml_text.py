"""YAML whose unquoted values keep their text: `dir: 007` is the path "007" for a path, and the number 7 for a number.

YAML decides by spelling alone whether 20241105, 1e3, on or null is a text. Which one is meant depends on the key, so
this module returns both readings, and `stack.config` chooses by the schema.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 1_000_000
"""With every alias expanded."""

_TAG = "tag:yaml.org,2002:"
_READ = {_TAG + kind for kind in ("str", "int", "float", "bool", "null")}


@dataclass(frozen=True)
class Plain:
    """A value as it was typed, and as YAML reads it."""

    text: str
    value: Any

    def __str__(self) -> str:
        return self.text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 with numbers such as 1e-3, and with dates and "=" as texts."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (f"{_TAG}timestamp", f"{_TAG}value", f"{_TAG}float")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
        |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read(path: Path) -> Any:
    """The values in the file `path`; see `parse`. Raises OSError, and ValueError for what is not YAML in UTF-8."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MB")
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}): save the file in UTF-8") from None


def parse(text: str) -> Any:
    """Dictionaries, lists and strings; every unquoted value that YAML takes for something else is a `Plain`.

    An empty text is None. Raises ValueError with a message of one line.
    """
    loader = _Loader(text)
    try:
        _check_depth(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).value(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """The parser of the documents themselves is recursive: it would overflow the stack of the process."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


class _Builder:
    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._count = 0
        self._flat: set[int] = set()

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values or {MAX_DEPTH} levels")
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(child, depth + 1) for child in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.ScalarNode) and node.tag in _READ:
            return self._scalar(node)
        raise ValueError(f"line {_line(node)}: tag {node.tag!r} is not supported")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        if id(node) not in self._flat:  # an alias leads to the same node again
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"line {_line(key)}: a key is a list or a mapping, expected a text")
                if key.value in seen:
                    raise ValueError(f"line {_line(key)}: key {key.value!r} is given twice")
                seen.add(key.value)
            self._loader.flatten_mapping(node)  # `<<: *other`
            self._flat.add(id(node))
        return {key.value: self.value(value, depth + 1) for key, value in node.value}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == f"{_TAG}str":
            return node.value
        if node.tag == f"{_TAG}null" and not node.value:
            return None
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError) as error:
            value = error  # more digits than Python reads, or an explicit tag on another text
        if not node.style:  # no quotes
            return Plain(node.value, value)
        if isinstance(value, Exception):
            raise ValueError(f"line {_line(node)}: {node.value!r} is not of its tag {node.tag!r}")
        return value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
