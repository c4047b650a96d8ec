"""Columns named by a path into a struct or object: `prompt.text` is the field `text` of the column `prompt`.

A column that has the whole name, dots included, comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa


def root_of(name: str, available: Collection[str]) -> str:
    """The column of `available` in which `name` is found; `name` itself if there is none."""
    if name in available:
        return name
    parts = name.split(".")
    roots = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((root for root in roots if root in available), name)


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """What `values` hold under `name`; None where the path ends early."""
    if name in values or "." not in name:
        return values.get(name)
    root = root_of(name, values)
    value = values.get(root)
    for part in _path(name, root):
        if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
            value = dict(value)  # an Arrow map
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def type_at(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The Arrow type of what `name` names; None if the schema has no such field."""
    root = root_of(name, schema.names)
    if root not in schema.names:
        return None
    arrow_type = schema.field(root).type
    for part in _path(name, root):
        if pa.types.is_map(arrow_type):
            arrow_type = arrow_type.item_type
        elif pa.types.is_struct(arrow_type) and arrow_type.get_field_index(part) >= 0:
            arrow_type = arrow_type.field(part).type
        else:
            return None
    return arrow_type


def _path(name: str, root: str) -> Sequence[str]:
    rest = name.removeprefix(root).lstrip(".")
    return rest.split(".") if rest else ()
