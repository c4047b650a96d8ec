"""The Arrow types of a JSONL input's columns, chosen from its first rows and fixed from then on.

A column with one kind of value is bool, int64, double or string; lists, objects and mixed kinds become JSON text. If
all values of the first rows are null the column is text: strings are kept, other values become JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from batchpipe.errors import RowError
from batchpipe.types import ErrorCode

_INT64_END = 2**63
_EXACT_DOUBLE_END = 2**53 + 1
_ACCEPTED: dict[pa.DataType, set[type]] = {
    pa.bool_(): {bool},
    pa.int64(): {int},
    pa.float64(): {int, float},
    pa.string(): {str},
}


@dataclass(frozen=True, slots=True)
class JsonColumn:
    """One column, and the Python types that its values may have; None allows any value, written as JSON text."""

    name: str
    arrow_type: pa.DataType
    accepted: frozenset[type] | None
    keeps_strings: bool = False  # if `accepted` is None: strings are not written as JSON

    def array(self, values: Sequence[Any]) -> tuple[pa.Array, dict[int, RowError]]:
        """The values as an array [N], with null for each value of another type, and the faults of these by position."""
        if self.accepted is None:
            return pa.array([self._as_text(value) for value in values], self.arrow_type), {}
        if set(map(type, values)) <= self.accepted | {type(None)}:
            try:
                return pa.array(values, self.arrow_type), {}
            except (OverflowError, pa.ArrowInvalid):
                pass  # a number is out of range; the code below finds which
        faults = {
            position: RowError(
                ErrorCode.WRONG_TYPE,
                f"column {self.name!r} is {self.arrow_type} in the first rows, here it is {_kind(value)}",
            )
            for position, value in enumerate(values)
            if value is not None and not _fits(value, self.arrow_type)
        }
        kept = [None if position in faults else value for position, value in enumerate(values)]
        return pa.array(kept, self.arrow_type), faults

    def _as_text(self, value: Any) -> str | None:
        if value is None or (self.keeps_strings and isinstance(value, str)):
            return value
        return orjson.dumps(value).decode()


def infer_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[JsonColumn]:
    """The columns `names`, with types that fit all of `rows`."""
    return [_infer(name, [value for row in rows if (value := row.get(name)) is not None]) for name in names]


def _infer(name: str, values: Sequence[Any]) -> JsonColumn:
    kinds = set(map(type, values))
    for arrow_type, accepted in _ACCEPTED.items():
        if kinds and kinds <= accepted and all(_fits(value, arrow_type) for value in values):
            return JsonColumn(name, arrow_type, frozenset(accepted))
    return JsonColumn(name, pa.string(), None, keeps_strings=not values)


def _fits(value: Any, arrow_type: pa.DataType) -> bool:
    if type(value) not in _ACCEPTED[arrow_type]:
        return False
    if type(value) is not int:
        return True
    return -_INT64_END <= value < _INT64_END if arrow_type == pa.int64() else abs(value) < _EXACT_DOUBLE_END


def _kind(value: Any) -> str:
    names = {bool: "a bool", int: "an int", float: "a double", str: "a string", list: "a list", dict: "an object"}
    name = names[type(value)]
    return f"{name} out of range" if type(value) is int and abs(value) >= _EXACT_DOUBLE_END else name
