"""The input as one stream of rows with ids, whatever its format. Opening it does all checks that need no rows."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchpipe.errors import InputError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import Carry, RawBatch, Reader, Wanted
from batchpipe.read.duplicates import SeenIds
from batchpipe.read.files import find_files
from batchpipe.read.formats.arrow_files import ArrowFilesReader
from batchpipe.read.formats.choose import choose_format
from batchpipe.read.formats.csv_rows import DELIMITERS, check_headers, csv_rows
from batchpipe.read.formats.hub import HUB_SCHEME, is_saved_dataset, open_hub, open_saved
from batchpipe.read.formats.json_array import json_rows
from batchpipe.read.formats.json_lines import line_rows
from batchpipe.read.formats.openai_batch import OpenAIBatchReader, holds_requests
from batchpipe.read.formats.parquet import ParquetReader
from batchpipe.read.formats.plain_text import plain_rows
from batchpipe.read.formats.text_rows import Parse, TextReader
from batchpipe.types import Carried, ErrorCode, FailedRow, Row, RowKey

logger = logging.getLogger(__name__)

MAX_ID_CHARACTERS = 1_024


class Source:
    """The rows of one input.

    `fingerprint` is equal for a copy of the input and differs for a changed one; `carried_schema` holds the exact types
    of the carried columns. `rows_seen` counts the rows read, skipped ones included; once `rows` ends it is the total.
    With `brings_requests` the rows are OpenAI's requests and bring their prompts and settings in columns of their own.
    """

    def __init__(self, reader: Reader, limit: int | None, *, needs_ids: bool = True) -> None:
        """needs_ids: whether a row with a wrong or repeated id fails; else it is named by its file and number."""
        self._reader = reader
        self.brings_requests = isinstance(reader, OpenAIBatchReader)
        self._needs_ids = needs_ids or self.brings_requests
        self._warned_of_ids = False
        self._limit = limit
        self.rows_seen = 0
        # Of the batch that rows come from: its last row's number, its rows, the reader's progress before it.
        self._batch_end = self._batch_rows = 0
        self._progress_before = 0.0
        self.carried_schema: pa.Schema = reader.carried_schema
        self.fingerprint: str = reader.fingerprint
        self.marked = reader.marked

    @property
    def progress(self) -> float:
        """Fraction of the input that has been read, from 0 to 1. The rows of a batch count alike."""
        progress = self._reader.progress
        if self._batch_rows:
            left = (self._batch_end - self.rows_seen) / self._batch_rows
            progress -= left * (progress - self._progress_before)
        return progress if self._limit is None else max(progress, min(1.0, self.rows_seen / self._limit))

    def num_rows(self) -> int | None:
        """The number of rows that `rows` gives if nothing is skipped; None if only reading them would tell."""
        num_rows = self._reader.num_rows()
        return num_rows if num_rows is None or self._limit is None else min(num_rows, self._limit)

    def rows(self, skip: Container[int] = frozenset()) -> Iterator[Row | FailedRow]:
        """Every row with an index that is not in `skip`, in input order. The ids of skipped rows count as seen."""
        seen_ids = SeenIds()
        self.rows_seen = self._batch_rows = 0
        progress = 0.0
        for batch in self._reader.batches():
            count = len(batch.rows)
            self._batch_end, self._batch_rows = self.rows_seen + count, count
            self._progress_before, progress = progress, self._reader.progress
            if self._limit is not None:
                count = min(count, self._limit - self.rows_seen)
            row_ids, faults = self._identified(batch, count, seen_ids)
            for offset, row_id in enumerate(row_ids):
                index = self.rows_seen
                self.rows_seen += 1
                if index in skip:
                    continue
                key = RowKey(index, row_id, Carried(batch.carried, offset))
                fault = faults.get(offset)
                yield Row(key, batch.rows[offset]) if fault is None else FailedRow(key, fault.code, fault.message)
            if self.rows_seen == self._limit:
                return

    def _identified(self, batch: RawBatch, count: int, seen_ids: SeenIds) -> tuple[list[str], dict[int, RowError]]:
        """Ids of the first `count` rows, and the reason why a row fails, wrong ids included, by offset."""
        faults = dict(batch.faults)
        column = self._reader.id_column
        if column is None:
            return [_file_row(batch, offset) for offset in range(count)], faults
        row_ids: list[Any] = [row.get(column) for row in batch.rows[:count]]
        if not _are_plain(row_ids):
            for offset, value in enumerate(row_ids):
                row_ids[offset], message = _checked_id(value, column)
                if message is not None:
                    self._refuse_id(faults, offset, ErrorCode.BAD_ID, message)
        given = [offset for offset, row_id in enumerate(row_ids) if row_id is not None]
        for offset, was_seen in zip(given, seen_ids.add_batch([row_ids[o] for o in given]), strict=True):
            if was_seen:
                message = f"the id {row_ids[offset]!r} belongs to an earlier row"
                self._refuse_id(faults, offset, batch.duplicate_code, message)
                if not self._needs_ids:
                    row_ids[offset] = None
        return [row_id or _file_row(batch, offset) for offset, row_id in enumerate(row_ids)], faults

    def _refuse_id(self, faults: dict[int, RowError], offset: int, code: ErrorCode, message: str) -> None:
        """Fails the row, unless the job never said that the column holds ids."""
        if self._needs_ids:
            faults.setdefault(offset, RowError(code, message))
        elif not self._warned_of_ids:
            self._warned_of_ids = True
            logger.warning(
                "%s; such rows are named '<file name>:<row number>' (write input.id_column: %s to fail them, or "
                "input.id_column: null to name all rows so)",
                *(message, self._reader.id_column),
            )


def open_source(spec: InputSpec, *, carry: Carry, needed: frozenset[str], exclude: Path | None = None) -> Source:
    """The input of a job. `needed` are the columns that prompts and sampling use, `exclude` is the output folder.

    OpenAI batch files do without `needed`.

    Raises InputError if the input cannot be read, JobError if a column to carry is missing.
    """
    wanted = Wanted(spec, carry, needed)
    return Source(_open_reader(wanted, exclude), spec.limit, needs_ids=wanted.names_id_column)


def _open_reader(wanted: Wanted, exclude: Path | None) -> Reader:
    spec = wanted.spec
    paths = [spec.path] if isinstance(spec.path, str) else list(spec.path)
    for path in paths:
        is_hub = path.startswith(HUB_SCHEME)
        if is_hub or is_saved_dataset(path):
            if len(paths) > 1:
                raise InputError(f"input.path: {path} is a dataset; it can only be read alone")
            return (open_hub if is_hub else open_saved)(path, wanted)
    files, kind = choose_format(find_files(paths, exclude), spec.format)
    if kind == "openai-batch" or (spec.format == "auto" and kind == "jsonl" and holds_requests(files, spec)):
        return OpenAIBatchReader(files, wanted)
    if kind in ("arrow", "parquet"):
        return (ArrowFilesReader if kind == "arrow" else ParquetReader)(files, wanted)
    if kind in DELIMITERS:
        check_headers(files, spec.max_line_bytes, DELIMITERS[kind])
        return TextReader(files, wanted, partial(csv_rows, delimiter=DELIMITERS[kind]))
    parsers: dict[str, Parse] = {
        "jsonl": line_rows,
        "json": json_rows,
        "text": partial(plain_rows, column=spec.prompt_column),
    }
    return TextReader(files, wanted, parsers[kind])


def _file_row(batch: RawBatch, offset: int) -> str:
    """The id of a row that brings none."""
    return f"{batch.file_name}:{batch.first_row + offset}"


def _are_plain(row_ids: list[Any]) -> bool:
    """Whether all ids are valid texts, tested for the whole batch at once because nearly every batch passes."""
    return set(map(type, row_ids)) == {str} and all(row_ids) and max(map(len, row_ids)) <= MAX_ID_CHARACTERS


def _checked_id(value: Any, column: str) -> tuple[str | None, str | None]:
    """(the id, None) of a text or whole number, also one that a table holds as a double; else (None, what is wrong)."""
    if value is None or value != value:  # pandas writes NaN for null
        return None, f"the id column {column!r} is missing or null"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None, f"the id column {column!r} holds {type(value).__name__}; an id is text or a whole number"
    if value == "":
        return None, f"the id column {column!r} holds an empty text"
    if isinstance(value, str) and len(value) > MAX_ID_CHARACTERS:
        return None, f"the id has {len(value):,} characters; at most {MAX_ID_CHARACTERS:,} are allowed"
    return str(value), None
