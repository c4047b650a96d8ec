"""Plain text: every line that is not blank is a prompt, in a column that has the name of the job's prompt column."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from batchpipe.errors import RowError
from batchpipe.read.formats.json_lines import JsonRow
from batchpipe.read.formats.line_file import LineFile, Parsed
from batchpipe.types import ErrorCode


def plain_rows(
    file: LineFile, name: str, max_row_bytes: int, once: Collection[str], *, column: str
) -> Iterator[Parsed]:
    line_number = 0
    for block in file.blocks(max_row_bytes):
        rows: list[JsonRow] = []
        faults: dict[int, RowError] = {}
        for line in block:
            line_number += 1
            where = f"{name}, line {line_number}"
            if line is None:
                faults[len(rows)] = RowError(ErrorCode.LINE_TOO_LONG, f"{where}: longer than input.max_line_bytes")
            elif not line.strip():
                continue
            else:
                try:
                    rows.append({column: line.decode().removesuffix("\r")})
                    continue
                except UnicodeDecodeError as error:
                    message = f"{where}: not valid UTF-8 (byte {error.start + 1})"
                    faults[len(rows)] = RowError(ErrorCode.INVALID_UTF8, message)
            rows.append({})
        yield rows, faults
