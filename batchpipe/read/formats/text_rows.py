"""Rows of text: JSON lines and arrays, CSV, plain lines. What cannot be read as a row is a failed row.

The columns are those of the first `SAMPLE_ROWS` rows. A column that appears only later can be used by a template or as
a prompt, but is not carried to the output. If an object of JSON holds a key twice, JSON readers disagree on which value
counts: the row fails if the key is the id's or one that prompts need, else the last value counts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from batchpipe.read.columns import RawBatch, Wanted, check_present
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.json_columns import infer_columns
from batchpipe.read.formats.json_lines import JsonRow
from batchpipe.read.formats.line_file import LineFile, Parsed, open_lines
from batchpipe.read.formats.marked_files import MarkedFiles
from batchpipe.read.nested import root_of

SAMPLE_ROWS = 1_000

logger = logging.getLogger(__name__)


class Parse(Protocol):
    """The rows of one open file, whose format the function knows.

    A row of more than `max_row_bytes` is a fault, and so is one that names a column of `once` twice. Raises InputError
    if the file as a whole cannot be read.
    """

    def __call__(self, file: LineFile, name: str, max_row_bytes: int, once: Collection[str], /) -> Iterator[Parsed]: ...


class TextReader:
    """A `Reader` of text files of one format, in their order."""

    def __init__(self, files: Sequence[InputFile], wanted: Wanted, parse: Parse) -> None:
        self._parse = parse
        self._files = list(zip(files, file_names(files), strict=True))
        self._max_row_bytes = wanted.spec.max_line_bytes
        self._total_bytes = sum(file.size_bytes for file in files)
        self._consumed_bytes = 0
        self.marked = MarkedFiles(self._files)
        self.fingerprint = self.marked.fingerprint
        for file in files:
            with open_lines(file):  # opening checks the first bytes
                pass
        sample = self._sample()
        available = list(dict.fromkeys(name for row in sample for name in row))
        self.id_column = wanted.id_column(available)
        used = wanted.used(self.id_column)
        self._once = sorted({root_of(name, available) for name in used})
        self._warned: set[str] = set()  # columns of which a value did not fit
        if sample:
            where = f"the input (first {len(sample):,} rows of {self._files[0][1]})"
            check_present(used, available, where)
        self._columns = infer_columns(sample, wanted.carried(available) if sample else [])
        self.carried_schema = pa.schema([(column.name, column.arrow_type) for column in self._columns])

    @property
    def progress(self) -> float:
        return self._consumed_bytes / self._total_bytes if self._total_bytes else 1.0

    def num_rows(self) -> int | None:
        return None

    def batches(self) -> Iterator[RawBatch]:
        finished_bytes = 0
        for file, name in self._files:
            first_row = 1
            with open_lines(file) as lines:
                for rows, faults in self._parsed(lines, name, self._once):
                    self._consumed_bytes = finished_bytes + lines.stored_position_bytes
                    yield RawBatch(name, first_row, rows, self._carry(rows, name, first_row), faults)
                    first_row += len(rows)
            file.check_unchanged()
            finished_bytes += file.size_bytes
        self._consumed_bytes = finished_bytes

    def _sample(self) -> list[JsonRow]:
        sample: list[JsonRow] = []
        for file, name in self._files:
            with open_lines(file) as lines:
                for rows, faults in self._parsed(lines, name, ()):
                    sample += [row for position, row in enumerate(rows) if position not in faults]
                    if len(sample) >= SAMPLE_ROWS:
                        return sample[:SAMPLE_ROWS]
        return sample

    def _parsed(self, lines: LineFile, name: str, once: Collection[str]) -> Iterator[Parsed]:
        return (parsed for parsed in self._parse(lines, name, self._max_row_bytes, once) if parsed[0])

    def _carry(self, rows: Sequence[JsonRow], file_name: str, first_row: int) -> pa.RecordBatch:
        """The carried columns of `rows`. A value that does not fit its column's type is null, with one warning."""
        arrays = []
        for column in self._columns:
            array, misfits = column.array([row.get(column.name) for row in rows])
            arrays.append(array)
            if misfits and column.name not in self._warned:
                self._warned.add(column.name)
                position, kind = next(iter(misfits.items()))
                logger.warning(
                    "output.columns: %r is %s in most of the first rows, and %s in row %d of %s; such values are null "
                    "in the output",
                    *(column.name, column.arrow_type, kind, first_row + position, file_name),
                )
        if not arrays:
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
        return pa.RecordBatch.from_arrays(arrays, schema=self.carried_schema)
