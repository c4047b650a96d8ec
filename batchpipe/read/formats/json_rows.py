"""Lines to JSON objects. What is wrong with a line is said by file and line number, never by its text."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import orjson

from batchpipe.errors import RowError
from batchpipe.types import ErrorCode

JsonRow = dict[str, Any]


def parse_lines(
    lines: Sequence[bytes | None], first_line: int, file_name: str, once: Collection[str]
) -> tuple[list[JsonRow], dict[int, RowError]]:
    """The object of each line that is not blank, {} where there is none, and the faults by position.

    `first_line` is the number of the first line in its file. A line that gives a key of `once` twice is a fault.
    """
    rows: list[JsonRow] = []
    faults: dict[int, RowError] = {}
    line_numbers: list[int] = []
    for line_number, line in enumerate(lines, first_line):
        try:
            row = orjson.loads(line)  # type: ignore[arg-type]  # None is refused like any other fault
        except orjson.JSONDecodeError as error:
            if line is not None and not line.strip():
                continue
            row = {}
            faults[len(rows)] = _fault(f"{file_name}, line {line_number}", line, error)
        if type(row) is not dict:
            message = f"{file_name}, line {line_number}: {_KINDS[type(row)]} where an object belongs"
            faults[len(rows)] = RowError(ErrorCode.NOT_AN_OBJECT, message)
            row = {}
        rows.append(row)
        line_numbers.append(line_number)
    for key in once:
        for position in _positions_given_twice(lines, rows, line_numbers, first_line, key):
            message = f"{file_name}, line {line_numbers[position]}: the key {key!r} is given twice"
            faults[position] = RowError(ErrorCode.INVALID_JSON, message)
            rows[position] = {}
    return rows, faults


def _fault(where: str, line: bytes | None, error: orjson.JSONDecodeError) -> RowError:
    if line is None:
        return RowError(ErrorCode.LINE_TOO_LONG, f"{where}: longer than input.max_line_bytes")
    try:
        line.decode()
    except UnicodeDecodeError as encoding_error:
        message = f"{where}: not valid UTF-8 (byte {encoding_error.start + 1})"
        return RowError(ErrorCode.INVALID_UTF8, message)
    return RowError(ErrorCode.INVALID_JSON, f"{where}: not valid JSON ({error.msg}, character {error.pos + 1})")


def _positions_given_twice(
    lines: Sequence[bytes | None], rows: Sequence[JsonRow], line_numbers: Sequence[int], first_line: int, key: str
) -> list[int]:
    """Rows whose line gives `key` twice at its top level.

    Counting the key's bytes over all lines is cheap, and tells that there is none; only lines where they are found
    twice are parsed again.
    """
    needle = orjson.dumps(key)
    given = [line for line in lines if line is not None]
    if b"\n".join(given).count(needle) <= sum(key in row for row in rows):
        return []
    positions = []
    for position, line_number in enumerate(line_numbers):
        line = lines[line_number - first_line]
        if key in rows[position] and line is not None and line.count(needle) > 1:
            pairs = json.loads(line, object_pairs_hook=list)
            if sum(name == key for name, _ in pairs) > 1:
                positions.append(position)
    return positions


_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
