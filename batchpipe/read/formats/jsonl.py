"""JSON Lines: one object a line, strictly; a line that is not one is a failed row.

The columns are those of the first `SAMPLE_ROWS` rows. One that appears later is readable by a template or as a prompt,
but is not carried to the output. Of a key given twice in one line, JSON readers keep one or the other: for the id and
the columns a prompt is made of the line fails, for other columns the last one counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import xxhash

from batchpipe.errors import RowError
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import Carry, RawBatch, check_present, choose_carried, choose_id_column
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.json_columns import JsonColumn, infer_columns
from batchpipe.read.formats.json_rows import JsonRow, parse_lines
from batchpipe.read.formats.lines import LineFile, open_lines

SAMPLE_ROWS = 1_000


class JsonlReader:
    """A `Reader` of JSONL files, in their order."""

    def __init__(self, files: Sequence[InputFile], spec: InputSpec, carry: Carry, needed: frozenset[str]) -> None:
        self._files = list(zip(files, file_names(files), strict=True))
        self._max_line_bytes = spec.max_line_bytes
        self._total_bytes = sum(file.size_bytes for file in files)
        self._consumed_bytes = 0
        self.fingerprint = xxhash.xxh3_128_hexdigest(b"".join(file.fingerprint(name) for file, name in self._files))
        for file in files:
            with open_lines(file):  # checks its head
                pass
        sample = self._sample()
        available = list(dict.fromkeys(name for row in sample for name in row))
        self.id_column = choose_id_column(spec, available)
        self._once = needed if self.id_column is None else needed | {self.id_column}
        if sample:
            where = f"the input (first {len(sample):,} rows of {self._files[0][1]})"
            check_present(sorted(self._once), available, where)
        carried = choose_carried(carry, available) if sample else []
        self._columns: list[JsonColumn] = infer_columns(sample, carried)
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
        """The carried columns of `rows`; a value of another type than its column's is null, and a fault."""
        arrays = []
        for column in self._columns:
            array, misfits = column.array([row.get(column.name) for row in rows])
            arrays.append(array)
            faults.update({position: fault for position, fault in misfits.items() if position not in faults})
        if not arrays:
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
        return pa.RecordBatch.from_arrays(arrays, schema=self.carried_schema)
