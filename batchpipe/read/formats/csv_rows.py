"""CSV and TSV: the first row names the columns, and every cell is text exactly as it stands, so that 007 stays 007.

A cell in quotes may hold the delimiter, line ends and doubled quotes. A row that is wrong costs its first line alone:
reading goes on with the second, so that a quote without an end does not take the rest of the file along.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from batchpipe.errors import InputError, RowError
from batchpipe.read.columns import BATCH_ROWS
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.json_lines import JsonRow
from batchpipe.read.formats.line_file import LineFile, Parsed, open_lines
from batchpipe.read.formats.promote import check_same_columns
from batchpipe.types import ErrorCode

DELIMITERS = {"csv": ",", "tsv": "\t"}

_Cells = Iterator[tuple[list[str], RowError | None]]

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the whole process; input.max_line_bytes is what limits a row


def csv_rows(
    file: LineFile, name: str, max_row_bytes: int, once: Collection[str], *, delimiter: str
) -> Iterator[Parsed]:
    """The rows in batches; InputError if the first row cannot name the columns."""
    header, lines, given = _opened(file, name, max_row_bytes, delimiter)
    rows: list[JsonRow] = []
    faults: dict[int, RowError] = {}
    for cells, fault in given:
        if fault is None and len(cells) != len(header):
            fault = _fault(lines, name, f"{len(cells)} cells where the first row names {len(header)} columns")
        if fault is not None:
            faults[len(rows)] = fault
        rows.append(dict(zip(header, cells, strict=True)) if fault is None else {})
        if len(rows) == BATCH_ROWS:
            yield rows, faults
            rows, faults = [], {}
    if rows:
        yield rows, faults


def check_headers(files: Sequence[InputFile], max_row_bytes: int, delimiter: str) -> None:
    """Raises InputError if a file names other columns than the first: it may have no header at all."""
    headers = []
    for file, name in zip(files, file_names(files), strict=True):
        with open_lines(file) as lines:
            headers.append(_opened(lines, name, max_row_bytes, delimiter)[0])
        check_same_columns(file, headers[-1], headers[0], exactly=True, first=files[0])


def _opened(file: LineFile, name: str, max_row_bytes: int, delimiter: str) -> tuple[list[str], _Lines, _Cells]:
    """The columns' names, the lines, and the cells of the rows behind the first one."""
    first_line = file.peek(max_row_bytes).partition(b"\n")[0]
    if delimiter == "," and b"," not in first_line and b";" in first_line:
        delimiter = ";"  # of spreadsheets where the comma is the decimal sign
    lines = _Lines(file, max_row_bytes)
    given = _cells(lines, name, delimiter)
    cells, fault = next(given, ([], None))
    if fault is not None:
        raise InputError(f"input.path: the header of the columns cannot be read: {fault.message}")
    header = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(cells)]  # pandas' name for it
    if duplicates := [column for column in header if header.count(column) > 1]:
        raise InputError(f"input.path: {name} has more than one column {duplicates[0]!r}")
    return header, lines, given


def _cells(lines: _Lines, name: str, delimiter: str) -> _Cells:
    """The cells of every row that is not blank, or why it cannot be read."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _fault(lines, name, f"no row of CSV ({error})")
        except _TooLongError:
            fault = RowError(
                ErrorCode.LINE_TOO_LONG,
                f"{_place(lines, name)}: longer than input.max_line_bytes, or its quote never ends",
            )
        else:
            if not lines.is_utf8:
                yield [], RowError(ErrorCode.INVALID_UTF8, f"{_place(lines, name)}: not valid UTF-8")
            elif cells:
                yield cells, None
            continue
        lines.give_back()
        yield [], fault


class _Lines:
    """The lines of a file as texts, of which those of a row can be given back but for the first."""

    def __init__(self, file: LineFile, max_row_bytes: int) -> None:
        self._blocks = file.blocks(max_row_bytes)
        self._ready: deque[bytes | None] = deque()
        self._max_row_bytes = max_row_bytes
        self._taken: list[bytes | None] = []
        self._taken_bytes = 0
        self.first_number = 1
        self.is_utf8 = True

    def begin_row(self) -> None:
        self.first_number += len(self._taken)
        self._taken, self._taken_bytes, self.is_utf8 = [], 0, True

    def give_back(self) -> None:
        self._ready.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while not self._ready:
            self._ready.extend(next(self._blocks))
        line = self._ready.popleft()
        self._taken.append(line)
        self._taken_bytes += len(line or b"")
        if line is None or self._taken_bytes > self._max_row_bytes:
            raise _TooLongError
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode(errors="replace") + "\n"


class _TooLongError(Exception):
    """A row is longer than what is held of it."""


def _fault(lines: _Lines, name: str, reason: str) -> RowError:
    return RowError(ErrorCode.INVALID_CSV, f"{_place(lines, name)}: {reason}")


def _place(lines: _Lines, name: str) -> str:
    return f"{name}, line {lines.first_number}"
