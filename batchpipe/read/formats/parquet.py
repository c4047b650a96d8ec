"""Parquet files, in small batches whatever their row groups, with only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from batchpipe.errors import InputError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import (
    BATCH_ROWS,
    Carry,
    RawBatch,
    check_arrow_columns,
    check_present,
    choose_carried,
    choose_id_column,
)
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.hive import HivePartitions
from batchpipe.types import ErrorCode

_READ_BYTES = 1 << 20  # pages are read through a buffer, so that a huge row group is never held whole


class ParquetReader:
    """A `Reader` of Parquet files of one schema, in their order, with the columns of Hive partition folders."""

    def __init__(self, files: Sequence[InputFile], spec: InputSpec, carry: Carry, needed: frozenset[str]) -> None:
        self._files = list(zip(files, file_names(files), strict=True))
        self._partitions = HivePartitions(files)
        self._num_rows = 0
        self._rows_read = 0
        schema = self._checked_schema(files[0])
        self.id_column = choose_id_column(spec, schema.names)
        ids = set() if self.id_column is None else {self.id_column}
        self._needed = sorted(needed | ids)
        check_present(self._needed, schema.names, files[0].path)
        check_arrow_columns(schema, spec, self.id_column, files[0].path)
        carried = choose_carried(carry, schema.names)
        self.carried_schema = pa.schema([schema.field(name) for name in carried])
        self._columns = sorted({*self._needed, *carried} - set(self._partitions.schema.names))
        used = {name: schema.field(name).type for name in {*self._needed, *carried}}
        if carry == "all":
            used = {field.name: field.type for field in schema}
        for file in files:
            self._check_same(file, used, exactly=carry == "all", first=files[0])
        self.fingerprint = xxhash.xxh3_128_hexdigest(b"".join(file.fingerprint(name) for file, name in self._files))

    @property
    def progress(self) -> float:
        return self._rows_read / self._num_rows if self._num_rows else 1.0

    def num_rows(self) -> int | None:
        return self._num_rows

    def batches(self) -> Iterator[RawBatch]:
        self._rows_read = 0
        for file, name in self._files:
            first_row = 1
            with _open_parquet(file) as parquet:
                for read in parquet.iter_batches(BATCH_ROWS, columns=self._columns, use_threads=False):
                    batch = self._partitions.add_to(read, file)
                    yield raw_batch(batch, name, first_row, self._needed, self.carried_schema)
                    first_row += batch.num_rows
                    self._rows_read += batch.num_rows
            file.check_unchanged()

    def _checked_schema(self, file: InputFile) -> pa.Schema:
        """The file's columns and the partitions' after them."""
        with _open_parquet(file) as parquet:
            schema = parquet.schema_arrow.remove_metadata()
        for column in self._partitions.schema:
            if column.name in schema.names:
                raise InputError(
                    f"input.path: column {column.name!r} is in {file.path} and in the names of its folders"
                )
            schema = schema.append(column)
        return schema

    def _check_same(self, file: InputFile, used: Mapping[str, pa.DataType], *, exactly: bool, first: InputFile) -> None:
        schema = self._checked_schema(file)
        missing = set(used) - set(schema.names)
        extra = set(schema.names) - set(used) if exactly else set()
        if missing or extra:
            name = sorted(missing | extra)[0]
            lacking, having = (file, first) if missing else (first, file)
            raise InputError(f"input.path: column {name!r} is in {having.path}, but not in {lacking.path}")
        for name, arrow_type in used.items():
            if schema.field(name).type != arrow_type:
                raise InputError(
                    f"input.path: column {name!r} is {schema.field(name).type} in {file.path}, "
                    f"but {arrow_type} in {first.path}"
                )
        with _open_parquet(file) as parquet:
            self._num_rows += parquet.metadata.num_rows
            _check_codecs(parquet.metadata, file)


def raw_batch(
    batch: pa.RecordBatch, file_name: str, first_row: int, needed: Sequence[str], carried_schema: pa.Schema
) -> RawBatch:
    """`batch` parted into the values that are needed and the carried columns."""
    rows, faults = _python_rows(batch.select(needed))
    carried = batch.select(carried_schema.names).cast(carried_schema)
    return RawBatch(file_name, first_row, rows, carried, faults)


def _python_rows(batch: pa.RecordBatch) -> tuple[list[dict[str, Any]], dict[int, RowError]]:
    try:
        return batch.to_pylist(), {}
    except ValueError:  # a value that Python cannot hold, such as text that is not UTF-8: find its row
        rows: list[dict[str, Any]] = []
        faults: dict[int, RowError] = {}
        for offset in range(batch.num_rows):
            try:
                rows += batch.slice(offset, 1).to_pylist()
            except ValueError as error:
                is_text = isinstance(error, UnicodeDecodeError)
                code = ErrorCode.INVALID_UTF8 if is_text else ErrorCode.WRONG_TYPE
                reason = "text that is not valid UTF-8" if is_text else str(error)
                faults[offset] = RowError(code, f"a value of the row cannot be read: {reason}")
                rows.append({})
        return rows, faults


@contextmanager
def _open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """What pyarrow says against the file, on opening or reading it, as InputError."""
    with file.open() as source:
        try:
            with pq.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False) as parquet:
                yield parquet
        except (OSError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"input.path: {file.path} cannot be read as Parquet: {reason}") from error


def _check_codecs(metadata: pq.FileMetaData, file: InputFile) -> None:
    if not metadata.num_row_groups:
        return
    group = metadata.row_group(0)
    for codec in {group.column(position).compression.lower() for position in range(group.num_columns)}:
        if codec != "uncompressed" and not pa.Codec.is_available(codec):
            raise InputError(f"input.path: {file.path} is compressed with {codec}, which cannot be read here")
