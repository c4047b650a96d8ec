"""The committed completions of an output folder in the order of the input, a window of input rows at a time.

Parts hold rows in the order in which they ended, so a window draws on a few parts near it. It is at least as large as
the largest part: a part is read about twice, and memory holds one window and one part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.write.commit import read_commits
from batchpipe.write.folder import part_names
from batchpipe.write.place import COMMITS, COMPLETIONS, STATE, Place
from batchpipe.write.row_set import Int64Array, Range, to_ranges

WINDOW_ROWS = 16_384
_PYTHON_ROWS = 1_024  # turned into Python objects at a time


@dataclass(frozen=True, slots=True)
class Part:
    """A part's name in its place, the number of its completions, and the input rows that they belong to."""

    place: Place
    name: str
    num_rows: int
    row_ranges: Sequence[Range]


@dataclass(frozen=True)
class Completions:
    """The committed parts of one output folder, at least one."""

    parts: Sequence[Part]

    @cached_property
    def schema(self) -> pa.Schema:
        part = self.parts[0]
        with part.place.open(part.name) as file:
            return pq.read_schema(file)

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """Of the parts' footers: the job's identity, the model."""
        return self.schema.metadata or {}

    def rows(
        self, columns: Collection[str] | None = None, *, window_rows: int = WINDOW_ROWS
    ) -> Iterator[dict[str, Any]]:
        """Every committed completion as Python values by column, in the order of the input, samples as neighbours.

        columns: those to give, if they are there; None for all. Raises OutputError for a part that cannot be read and a
        value that Python cannot hold.
        """
        names = self.schema.names if columns is None else [name for name in self.schema.names if name in columns]
        window_rows = max(window_rows, *(part.num_rows for part in self.parts))
        for window, parts in sorted(self._by_window(window_rows).items()):
            start = window * window_rows
            table = pa.concat_tables([_rows_between(part, start, start + window_rows) for part in parts])
            in_order = np.lexsort((np.asarray(table["sample_index"]), np.asarray(table["row_index"])))
            for batch in take_rows(table.select(names), in_order).to_batches(max_chunksize=_PYTHON_ROWS):
                yield from _python_rows(batch)

    def _by_window(self, window_rows: int) -> dict[int, list[Part]]:
        windows: dict[int, list[Part]] = {}
        for part in self.parts:
            touched = {
                window
                for first, last in part.row_ranges
                for window in range(first // window_rows, last // window_rows + 1)
            }
            for window in touched:
                windows.setdefault(window, []).append(part)
        return windows


def open_completions(place: Place) -> Completions:
    """What is committed right now, also while a run goes on. Raises OutputError if `place` holds no completions."""
    if place.size_bytes(f"{STATE}/identity.json") is None:
        raise OutputError(f"{place.address}: is no output folder of batchpipe (it has no {STATE}/identity.json).")
    records, _ = read_commits(place.read(f"{STATE}/{COMMITS}") or b"")
    parts = [Part(place, f"{COMPLETIONS}/{record.name}", record.num_rows, record.row_ranges) for record in records]
    names = part_names(place)
    for part in parts:
        if part.name not in names:
            raise OutputError(f"{place / part.name}: was committed and cannot be found; put it back.")
    recorded = {part.name for part in parts}
    # A run that was killed may have committed a part without recording it.
    parts += [_described(place, name) for name in names if name not in recorded]
    if not parts:
        raise OutputError(f"{place.address}: holds no completions yet; run the job again to continue it.")
    return Completions(parts)


def take_rows(table: pa.Table, positions: Int64Array) -> pa.Table:
    try:
        return table.take(pa.array(positions))
    except pa.ArrowNotImplementedError:  # of string_view, of which Arrow can only join slices
        return pa.concat_tables(table.slice(position, 1) for position in positions.tolist()).combine_chunks()


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # such as a year beyond 9999, or text that is not UTF-8
        reason = f"a value of a carried column cannot be written as text: {error}"
        raise OutputError(f"{reason}; leave it to readers of the Parquet parts") from error
    return rows


def _rows_between(part: Part, start: int, end: int) -> pa.Table:
    table = _read(part.place, part.name)
    row_indexes = np.asarray(table["row_index"])
    inside = (start <= row_indexes) & (row_indexes < end)
    return table if inside.all() else take_rows(table, np.flatnonzero(inside))


def _described(place: Place, name: str) -> Part:
    row_indexes = np.asarray(_read(place, name, ["row_index"])["row_index"])
    return Part(place, name, len(row_indexes), to_ranges(np.unique(row_indexes)))


def _read(place: Place, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with place.open(name) as source, pq.ParquetFile(source) as file:
            return file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{place / name}: cannot be read as a part of the completions: {error}") from error
