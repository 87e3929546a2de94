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
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from stack.shown import redact, redacted


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with code 2."""


def is_users(error: OSError) -> bool:
    """Whether the user can fix `error`: a path that is missing, forbidden, or of the wrong kind.

    Only such errors become a UserError. Any other one (EIO, ESTALE, ENOSPC, a network that is away) may pass: it is
    raised unchanged, the command exits with code 1, and the job scripts retry it.
    """
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class Config(pydantic.BaseModel):
    """Base of all configuration sections: frozen, and an unknown key is an error at every level."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @pydantic.field_validator("*")
    @classmethod
    def _refuse_urls_as_paths(cls, value: Any) -> Any:
        """s3://bucket/x would be a folder of that name, here, and a password in it part of the name."""
        if isinstance(value, Path) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            raise ValueError("a URL, expected a path on this machine")
        return value


C = TypeVar("C", bound=Config)


def load(schema: type[C], source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> C:
    """Read the file `source` (and those it names under `base:`), or take values, apply `a.b=value` overrides, validate.

    Raises UserError naming the file or key, and the nearest known key for an unknown one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged: Any
    if isinstance(source, str | Path):
        name, merged = str(source), _read(Path(source).resolve(), ())
    else:
        name, merged = "overrides", OmegaConf.create(dict(source or {}))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {redact(override)!r} is not of the form key.subkey=value")
        try:
            # A section is replaced by a section key by key, a plain value by a section as a whole.
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(redact(f"override {override!r}: {_first_line(error)}")) from None
    return validate(schema, OmegaConf.to_container(merged, resolve=False), name)


def _read(path: Path, above: tuple[Path, ...]) -> Any:
    from omegaconf import DictConfig, OmegaConf

    if path in above:
        raise UserError(f"{path}: `base:` goes round in a circle: {' -> '.join(map(str, (*above, path)))}")
    try:
        own = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(redact(f"{path}: cannot be read as YAML: {_first_line(error)}")) from None
    if not isinstance(own, DictConfig):
        raise UserError(f"{path}: expected key: value pairs at the top level")
    bases = own.pop("base", [])
    merged: Any = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = OmegaConf.merge(merged, _read((path.parent / base).resolve(), (*above, path)))
    return OmegaConf.merge(merged, own)


def validate(schema: type[C], values: Any, source: str) -> C:
    """Check `values` against `schema`; UserError lists every wrong key in one line, with `source` in front."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_explain(schema, e["loc"], e["type"], e["msg"], e.get("input")) for e in error.errors()]
        raise UserError(redact(f"{source}: {'; '.join(problems)}")) from None


def _explain(schema: type[Config], location: tuple[Any, ...], kind: str, message: str, value: Any) -> str:
    name = ".".join(str(part) for part in location if not _is_tag(schema, location, part))
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


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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
