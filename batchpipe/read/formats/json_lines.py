"""Lines of JSONL to objects. A message on a wrong line names file and line number and never quotes the line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import orjson

from batchpipe.errors import RowError
from batchpipe.read.formats.line_file import LineFile, Parsed
from batchpipe.types import ErrorCode

JsonRow = dict[str, Any]

_NUMBER = "a number"
_KINDS = {list: "a list", str: "a string", int: _NUMBER, float: _NUMBER, bool: "true or false", type(None): "null"}


def line_rows(file: LineFile, name: str, max_row_bytes: int, once: Collection[str]) -> Iterator[Parsed]:
    """The rows of JSON lines. A line that holds a key of `once` twice is a fault."""
    first_line = 1
    for block in file.blocks(max_row_bytes):
        yield parse_lines(block, first_line, name, once)
        first_line += len(block)


def parse_lines(
    lines: Sequence[bytes | None], first_line: int, file_name: str, once: Collection[str], unit: str = "line"
) -> Parsed:
    """(the object of each line that is not blank, faults by position in that list); a faulty line's object is {}.

    `first_line` is the number of the first line in its file, `unit` what messages call a line.
    """
    rows: list[JsonRow] = []
    faults: dict[int, RowError] = {}
    line_numbers: list[int] = []
    for line_number, line in enumerate(lines, first_line):
        try:
            row = orjson.loads(line)  # type: ignore[arg-type]  # None is refused, as invalid JSON is
        except orjson.JSONDecodeError as error:
            if line is not None and not line.strip():
                continue
            row = {}
            faults[len(rows)] = _fault(f"{file_name}, {unit} {line_number}", line, error)
        if type(row) is not dict:
            message = f"{file_name}, {unit} {line_number}: {_KINDS[type(row)]} where an object belongs"
            faults[len(rows)] = RowError(ErrorCode.NOT_AN_OBJECT, message)
            row = {}
        rows.append(row)
        line_numbers.append(line_number)
    for key in once:
        for position in _positions_given_twice(lines, rows, line_numbers, first_line, key):
            message = f"{file_name}, {unit} {line_numbers[position]}: the key {key!r} is given twice"
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
    """Positions of rows that hold `key` twice at the top level of their line.

    Counting the key's bytes in all lines is cheap and shows that no line does; only if the count is too high are the
    lines that contain the bytes twice parsed again.
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
