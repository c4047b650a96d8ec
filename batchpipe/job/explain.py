"""Turns pydantic's validation errors into lines that name the key's path, the value, and what to write instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from batchpipe.job.values import Expects

_SHOWN_CHARACTERS = 80


def shown(value: Any) -> str:
    """A value as messages quote it: null and booleans are written as in YAML, and long values are cut."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def section_of(model: type[BaseModel], key: object) -> type[BaseModel] | None:
    """The section under `key` of `model`, or None if the key is unknown or has a plain value."""
    field = model.model_fields.get(key) if isinstance(key, str) else None
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def unknown_key(section_path: tuple[str, ...], key: object, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """One line for a key that is not among `known`; `elsewhere` are the dotted paths of other sections' keys."""
    path = ".".join((*section_path, str(key)))
    near = get_close_matches(str(key), list(known), n=1) or [
        place for place in elsewhere if place.rpartition(".")[2] == key
    ]
    return f"{path}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")


def key_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of `model` that is not a section, as a dotted path."""
    paths: list[str] = []
    for key in model.model_fields:
        section = section_of(model, key)
        paths += key_paths(section, f"{prefix}{key}.") if section else [prefix + key]
    return paths


def explain(error: ValidationError, model: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    """One line for each wrong key of `data`, given the error that validating it as `model` raised."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        path, line = _line(problem["type"], problem["loc"], problem["msg"], model, data)
        lines.setdefault(path, line)
    return list(lines.values())


def _line(
    kind: str, location: tuple[int | str, ...], message: str, model: type[BaseModel], data: Any
) -> tuple[str, str]:
    """(dotted key, message) of one error. A location inside a list or mapping is reported as the key that holds it."""
    root = model
    path: tuple[str, ...] = ()
    field: FieldInfo | None = None
    for key in location:
        if kind in ("extra_forbidden", "invalid_key") and key not in model.model_fields:
            return ".".join((*path, str(key))), unknown_key(path, key, model.model_fields, key_paths(root))
        assert isinstance(key, str)
        path = (*path, key)
        field = model.model_fields[key]
        section = section_of(model, key)
        if kind == "missing" and len(path) == len(location):
            return ".".join(path), f"{'.'.join(path)}: is required"
        data = data[key]
        if section is None:
            break
        model = section
    dotted = ".".join(path)
    if kind == "related_keys":
        return f"{dotted}: related", f"{dotted}.{message}" if dotted else message
    # A section and a plain choice carry no `Expects`.
    choices = getattr(field.annotation, "__args__", ()) if field else ()
    default = f"one of {', '.join(map(repr, choices))}" if choices else "a section of keys"
    words = next((mark.words for mark in field.metadata if isinstance(mark, Expects)), default) if field else default
    return dotted, f"{dotted}: {shown(data)} is not {words}"
