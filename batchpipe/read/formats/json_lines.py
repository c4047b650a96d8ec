"""JSONL files to lines, and lines to JSON objects.

Only \\n ends a line, and a line that is too long is never held in memory. A message on a wrong line names file and line
number and never quotes the line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import pyarrow as pa

from batchpipe.errors import InputError, RowError
from batchpipe.read.files import InputFile
from batchpipe.types import ErrorCode

JsonRow = dict[str, Any]

BLOCK_BYTES = 262_144
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NUMBER = "a number"
_KINDS = {list: "a list", str: "a string", int: _NUMBER, float: _NUMBER, bool: "true or false", type(None): "null"}


class LineFile:
    """An open JSONL file, plain or compressed. `stored_position_bytes` counts stored (compressed) bytes read so far."""

    def __init__(self, file: InputFile, raw: pa.NativeFile, stream: pa.NativeFile) -> None:
        self._file = file
        self._raw = raw
        self._stream = stream

    @property
    def stored_position_bytes(self) -> int:
        return int(self._raw.tell())

    def blocks(self, max_line_bytes: int) -> Iterator[list[bytes | None]]:
        """Runs of consecutive lines without their \\n, blank ones included; None stands for a line that is too long."""
        pieces: list[bytes] = []  # the beginning of a line that the last block did not end
        open_bytes = 0
        block = self._read(min(BLOCK_BYTES, max_line_bytes)).removeprefix(_BYTE_ORDER_MARK)
        while block:
            first, *others = block.split(b"\n")
            open_bytes += len(first)
            if open_bytes <= max_line_bytes:
                pieces.append(first)
            else:
                pieces.clear()
            if others:
                *whole, last = others
                yield [b"".join(pieces) if open_bytes <= max_line_bytes else None, *whole]
                pieces, open_bytes = [last], len(last)
            block = self._read(min(BLOCK_BYTES, max_line_bytes))
        if open_bytes:
            yield [b"".join(pieces) if open_bytes <= max_line_bytes else None]

    def _read(self, num_bytes: int) -> bytes:
        try:
            return bytes(self._stream.read(num_bytes))
        except OSError as error:
            raise InputError(f"input.path: {self._file.path} is damaged or cut off: {error}") from error


@contextmanager
def open_lines(file: InputFile) -> Iterator[LineFile]:
    """Raises InputError if the compression is not the one that the file's name says, or the text is UTF-16."""
    with file.open() as raw:
        head = raw.read(4)
        raw.seek(0)
        named = next((kind for suffix, kind in _SUFFIXES.items() if file.path.endswith(suffix)), None)
        found = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
        if named != found and file.size_bytes:
            is_in_fact = f"it holds {found} data" if found else f"it does not hold {named} data"
            raise InputError(f"input.path: {file.path} has the wrong suffix: {is_in_fact}; rename it")
        if found is None:
            # A byte order mark shows UTF-16, and so does a zero beside the ASCII character that begins JSON.
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:2]:
                raise InputError(
                    f"input.path: {file.path} is UTF-16; JSON Lines are UTF-8, convert it (iconv -f UTF-16 -t UTF-8)"
                )
            yield LineFile(file, raw, raw)
        else:
            with pa.CompressedInputStream(raw, found) as stream:
                yield LineFile(file, raw, stream)


def parse_lines(
    lines: Sequence[bytes | None], first_line: int, file_name: str, once: Collection[str]
) -> tuple[list[JsonRow], dict[int, RowError]]:
    """(the object of each line that is not blank, faults by position in that list); a faulty line's object is {}.

    `first_line` is the number of the first line in its file. A line that holds a key of `once` twice is a fault.
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
