"""Completions as JSON lines and as CSV: one line a sample, all columns of the completions table."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from typing import Any

import orjson

from batchpipe.types import RowStatus

Line = tuple[bool, bytes]  # whether it is a result (else an error), and the line with its end


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    """Bytes are written in base 64, decimals and durations as text, NaN and infinity as null."""
    for row in rows:
        yield _is_result(row), orjson.dumps(row, default=_as_json, option=orjson.OPT_APPEND_NEWLINE)


def csv_header(names: Sequence[str]) -> bytes:
    return _csv_line(names)


def csv_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    """Null is an empty cell. Lists and structs are JSON text; the rest is written as in `json_lines`."""
    for row in rows:
        yield _is_result(row), _csv_line([_cell(value) for value in row.values()])


def _is_result(row: Mapping[str, Any]) -> bool:
    return bool(row["status"] == RowStatus.SUCCEEDED)


def _csv_line(cells: Sequence[object]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str | float):
        return value
    text = orjson.dumps(value, default=_as_json).decode()
    return orjson.loads(text) if text.startswith('"') else text


def _as_json(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time) else str(value)
