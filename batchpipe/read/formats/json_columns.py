"""The Arrow types of a JSONL input's columns, chosen from its first rows and fixed from then on.

Most of a column's values decide, so that one odd row changes no other row's cell: a column of truth values, whole
numbers or numbers gets their type, and a value that does not fit it is null. Any other column is text, in which
strings stand as they are and other values as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

_INT64_END = 2**63
_EXACT_DOUBLE_END = 2**53 + 1


@dataclass(frozen=True, slots=True)
class JsonColumn:
    """One carried column."""

    name: str
    arrow_type: pa.DataType

    def array(self, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
        """The values as an array [N], and by position what each value is that does not fit, for which null stands."""
        if self.arrow_type == pa.string():
            return pa.array([_as_text(value) for value in values], self.arrow_type), {}
        misfits = {
            position: _kind(value)
            for position, value in enumerate(values)
            if value is not None and not _fits(value, self.arrow_type)
        }
        kept = [None if position in misfits else value for position, value in enumerate(values)] if misfits else values
        return pa.array(kept, self.arrow_type), misfits


def infer_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[JsonColumn]:
    """The columns `names`, with the types that most values of `rows` have."""
    return [JsonColumn(name, _infer([row[name] for row in rows if row.get(name) is not None])) for name in names]


def _infer(values: Sequence[Any]) -> pa.DataType:
    most = len(values) // 2 + 1
    # A whole number beyond 64 bits is read as a double, which must not make doubles of the others.
    has_fractions = any(type(value) is float and abs(value) < _INT64_END for value in values)
    for arrow_type in (pa.bool_(), pa.float64() if has_fractions else pa.int64()):
        if sum(_fits(value, arrow_type) for value in values) >= most:
            return arrow_type
    return pa.string()


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _fits(value: Any, arrow_type: pa.DataType) -> bool:
    if arrow_type == pa.bool_():
        return type(value) is bool
    if arrow_type == pa.int64():
        return type(value) is int and -_INT64_END <= value < _INT64_END
    return type(value) is float or (type(value) is int and abs(value) < _EXACT_DOUBLE_END)


def _kind(value: Any) -> str:
    names = {bool: "a bool", int: "an int", float: "a double", str: "a string", list: "a list", dict: "an object"}
    name = names[type(value)]
    is_large = type(value) in (int, float) and abs(value) >= _EXACT_DOUBLE_END
    return f"{name} out of range" if is_large else name
