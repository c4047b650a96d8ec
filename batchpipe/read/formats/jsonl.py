"""JSON Lines: each line must be one JSON object; any other line is a failed row.

The columns are those of the first `SAMPLE_ROWS` rows. A column that appears only later can be used by a template or as
a prompt, but is not carried to the output. If a line holds a key twice, JSON readers disagree on which value counts:
the line fails if the key is the id's or one that prompts need, else the last value counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import xxhash

from batchpipe.errors import RowError
from batchpipe.read.columns import RawBatch, Wanted, check_present
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.json_columns import infer_columns
from batchpipe.read.formats.json_lines import JsonRow, LineFile, open_lines, parse_lines

SAMPLE_ROWS = 1_000


class JsonlReader:
    """A `Reader` of JSONL files, in their order."""

    def __init__(self, files: Sequence[InputFile], wanted: Wanted) -> None:
        self._files = list(zip(files, file_names(files), strict=True))
        self._max_line_bytes = wanted.spec.max_line_bytes
        self._total_bytes = sum(file.size_bytes for file in files)
        self._consumed_bytes = 0
        self.fingerprint = xxhash.xxh3_128_hexdigest(b"".join(file.fingerprint(name) for file, name in self._files))
        for file in files:
            with open_lines(file):  # opening checks the first bytes
                pass
        sample = self._sample()
        available = list(dict.fromkeys(name for row in sample for name in row))
        self.id_column = wanted.id_column(available)
        self._once = wanted.used(self.id_column)
        if sample:
            where = f"the input (first {len(sample):,} rows of {self._files[0][1]})"
            check_present(self._once, available, where)
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
                    yield RawBatch(name, first_row, rows, self._carry(rows, faults), faults)
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

    def _parsed(
        self, lines: LineFile, name: str, once: Collection[str]
    ) -> Iterator[tuple[list[JsonRow], dict[int, RowError]]]:
        first_line = 1
        for block in lines.blocks(self._max_line_bytes):
            rows, faults = parse_lines(block, first_line, name, once)
            if rows:
                yield rows, faults
            first_line += len(block)

    def _carry(self, rows: Sequence[JsonRow], faults: dict[int, RowError]) -> pa.RecordBatch:
        """The carried columns of `rows`. A value of another type than its column's becomes null and a fault."""
        arrays = []
        for column in self._columns:
            array, misfits = column.array([row.get(column.name) for row in rows])
            arrays.append(array)
            faults.update({position: fault for position, fault in misfits.items() if position not in faults})
        if not arrays:
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
        return pa.RecordBatch.from_arrays(arrays, schema=self.carried_schema)
