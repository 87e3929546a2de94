"""Configuration: YAML files with `base:` inheritance, dotted overrides, strict validation, dump and fingerprint.

Every component owns its typed section next to its class (a subclass of `Config`); this module only loads them.
Order of precedence: defaults < base files < the file itself < dotted overrides.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from stack import yaml_text
from stack.shown import redact, redacted
from stack.yaml_text import Plain


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with code 2."""


def is_users(error: OSError) -> bool:
    """Whether the user can fix `error`: a path that is missing, forbidden, or of the wrong kind.

    Only such errors become a UserError. Any other one (EIO, ESTALE, ENOSPC, a network that is away) may pass: it is
    raised unchanged, the command exits with code 1, and the job scripts retry it.
    """
    kinds = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EROFS)


def refusal(error: Exception, message: str) -> Exception:
    """UserError(message); or the error of the file system that led to `error`, where the user cannot fix it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and not is_users(cause):
            return cause
        cause = cause.__cause__ or cause.__context__
    return UserError(message)


MAX_INT = 2**64


def local_path(text: str) -> Path:
    """The path `text` with its `~` expanded. Raises ValueError for what only a shell expands, and for URLs."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):  # it would be a folder here, with a password in its name
        raise ValueError("a URL, expected a path on this machine")
    if not text.strip() or re.search(r"[\0-\x1f\x7f]", text):
        raise ValueError("expected a path, without line breaks and other control characters")
    if found := re.search(r"\$[({]?|`", text):
        raise ValueError(
            f"{found[0]!r} is not expanded in a path: write the path itself, or let the shell expand it (outside '…')"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("no such user: write ./~… for a file whose name begins with ~") from None


def location(text: str) -> str:
    """`text`, a path, glob, brace list, hub id or URL: paths as in `local_path`, others unchanged."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        return text
    local_path(text)
    at = r"(?:^|(?<=[{,]))~[^/,}]*" if "{" in text else r"^~[^/]*"  # {~/a,~/b}
    return re.sub(at, lambda found: str(local_path(found[0])), text)


Location = Annotated[str, pydantic.AfterValidator(location)]
"""A path as text, or what is no path: a glob, a brace list, a hub id, a URL."""

Seed = Annotated[int, pydantic.Field(ge=0, lt=MAX_INT)]
"""A seed of random numbers. torch's generators take 64 bits."""


class Config(pydantic.BaseModel):
    """Base of all configuration sections: frozen, and an unknown key is an error at every level."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @pydantic.field_validator("*")
    @classmethod
    def _check_paths_and_sizes(cls, value: Any) -> Any:
        return _checked(value)


def _checked(value: Any) -> Any:
    """`value` with its paths checked and expanded; ValueError for a whole number of more than 64 bits."""
    if isinstance(value, Path):
        return local_path(str(value))
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError("expected a number of at most 64 bits")
    if isinstance(value, dict):
        return {key: _checked(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_checked, value))
    return value


C = TypeVar("C", bound=Config)


def load(schema: type[C], source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> C:
    """Read the file `source` (and those it names under `base:`), or take values, apply `a.b=value` overrides, validate.

    An unquoted value keeps its text where the schema has a text or a path: run.dir=007 is the folder "007".
    Raises UserError naming the file or key, and the nearest known key for an unknown one.
    """
    if isinstance(source, str | Path):
        name, values = str(source), _read(Path(source).resolve(), ())
    else:
        name, values = "overrides", dict(source or {})
    for override in overrides:
        values = _merged(values, _override(override))
    return validate(schema, _read_as(values, [schema]), name)


def _override(text: str) -> dict[str, Any]:
    """`a.b=value` as {a: {b: value}}."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {redact(text)!r} is not of the form key.subkey=value")
    read: Any
    try:
        read = yaml_text.parse(value)
    except ValueError as error:
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        read = UserError(redact(f"override {shown!r}: {error}"))  # raised unless the key takes a text
    typed: Any = Plain(value.strip(), _value(read))
    if not value.strip():
        typed = None
    elif isinstance(read, str):  # without quotes, " #" does not begin a comment
        typed = read if value.lstrip()[0] in "'\"" else value.strip()
    for part in reversed(parts):
        typed = {part: typed}
    return typed


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise UserError(f"{path}: `base:` goes round in a circle: {' -> '.join(map(str, (*above, path)))}")
    try:
        own = yaml_text.read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise refusal(error, f"{path}: configuration cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(redact(f"{path}: cannot be read as YAML: {error}")) from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: expected key: value pairs at the top level")
    bases = own.pop("base", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str | Plain):
            raise UserError(f"{path}: base: expected the path of a configuration file, or a list of paths")
        try:
            file = path.parent / local_path(str(base))
        except ValueError as error:
            raise UserError(f"{path}: base: {error} (got {redact(str(base))!r})") from None
        merged = _merged(merged, _read(file.resolve(), (*above, path)))
    return _merged(merged, own)


def _merged(values: Any, new: Any) -> Any:
    """Both, the new value where both have one. Sections are merged key by key; all else is replaced as a whole."""
    if not isinstance(_value(new), dict) or not isinstance(_value(values), dict):
        return new
    values, new = _value(values), _value(new)
    return {**values, **{key: _merged(values.get(key), value) for key, value in new.items()}}


def _value(read: Any) -> Any:
    return read.value if isinstance(read, Plain) else read


def _read_as(value: Any, annotations: Sequence[Any]) -> Any:
    """`value` without `Plain`: the text where `annotations` have a text and not what YAML reads, else that."""
    leaves = [leaf for annotation in annotations for leaf in _types(annotation)]
    anything = [Any] if Any in leaves else []
    if isinstance(value, Plain):
        if (str in leaves or Path in leaves) and not _takes(leaves, value.value):
            return value.text
        if not leaves and isinstance(value.value, Exception):
            return value.text  # of an unknown key, which is the mistake to name
        value = value.value
    if isinstance(value, UserError):
        raise value
    if isinstance(value, Exception):
        raise UserError(redact(" ".join(str(value).split())[:300]))
    if isinstance(value, str) and not value.strip() and Path in leaves:
        return None  # Path("") is the current folder
    if isinstance(value, list):
        inner = [a for leaf in leaves if typing.get_origin(leaf) in (list, tuple) for a in typing.get_args(leaf)]
        return [_read_as(item, [*inner, *anything]) for item in value]
    if isinstance(value, dict):
        models = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, Config)]
        tagged = [model for model in models if _tag(model) is not None and _tag(model) == value.get("kind")]
        others = [typing.get_args(leaf)[1] for leaf in leaves if typing.get_origin(leaf) is dict]
        fields = [model.model_fields for model in tagged or models]
        return {
            key: _read_as(item, [*others, *anything, *(known[key].annotation for known in fields if key in known)])
            for key, item in value.items()
        }
    return value


def _types(annotation: Any) -> list[Any]:
    """The types that `annotation` is a union of; of a Literal, those of its values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _types(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [leaf for argument in arguments for leaf in _types(argument)]
    if origin is typing.Literal:
        return [type(argument) for argument in arguments]
    return [annotation]


def _takes(leaves: Sequence[Any], value: Any) -> bool:
    """Whether one of `leaves` is that of `value`, as YAML reads it."""
    if isinstance(value, dict):  # {a,b}.tar is a brace list, which YAML reads as {a: null, b: null} where it is whole
        sections = any(typing.get_origin(t) is dict or (isinstance(t, type) and issubclass(t, Config)) for t in leaves)
        return sections and not (value and all(item is None for item in value.values()))
    if isinstance(value, list):
        return any(typing.get_origin(t) in (list, tuple) for t in leaves)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int in leaves or float in leaves
    return type(value) in leaves


def validate(schema: type[C], values: Any, source: str) -> C:
    """Check `values` against `schema`; UserError lists every wrong key in one line, with `source` in front."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_explain(schema, e["loc"], e["type"], e["msg"], e.get("input")) for e in error.errors()]
        raise UserError(redact(f"{source}: {'; '.join(problems)}")) from None


def _explain(schema: type[Config], location: tuple[Any, ...], kind: str, message: str, value: Any) -> str:
    parts = [str(part) for part in location if not _is_tag(schema, location, part)]
    name = ".".join(part for part in parts if not re.match(r"(dict|function-\w+)\[", part))  # a union's member
    if kind == "extra_forbidden":
        known = sorted(_known_keys(schema, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {name!r}, {hint}"
    if kind == "missing":
        return f"key {name!r} is missing"
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool | type(None)) else ""
    return f"{name or 'values'}: {message.removeprefix('Value error, ')}{shown}"


def _models(annotation: Any) -> list[type[Config]]:
    """The Config classes an annotation can hold (unions, optionals, lists, dictionaries)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if typing.get_origin(annotation) is typing.Annotated:
        return _models(typing.get_args(annotation)[0])
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _descend(schema: type[Config], location: Iterable[Any]) -> list[type[Config]]:
    """The sections that `location` (a pydantic error path, union tags included) can mean."""
    models = [schema]
    for part in location:
        tagged = [m for m in models if _tag(m) == part]
        fields = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        if fields:
            models = [found for annotation in fields for found in _models(annotation)]
        elif tagged:
            models = tagged
    return models


def _tag(model: type[Config]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field is not None else None


def _is_tag(schema: type[Config], location: tuple[Any, ...], part: Any) -> bool:
    before = _descend(schema, location[: location.index(part)])
    return any(_tag(m) == part for m in before) and not any(part in m.model_fields for m in before)


def _known_keys(schema: type[Config], location: Iterable[Any]) -> set[str]:
    return {key for model in _descend(schema, location) for key in model.model_fields}


def public(config: Config) -> dict[str, Any]:
    """The values of `config` as JSON has them, without the secrets of URLs: what is saved, shown and sent elsewhere."""
    values: dict[str, Any] = redacted(config.model_dump(mode="json"))
    return values


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every key written out, without the secrets of URLs."""
    return yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)


def fingerprint(config: Config) -> str:
    """sha256 of the canonical JSON of what `public` tells."""
    return fingerprint_of(public(config))


def fingerprint_of(values: Any) -> str:
    """sha256 of the canonical JSON of `values`."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
