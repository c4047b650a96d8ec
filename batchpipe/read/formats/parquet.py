"""Parquet files, read in small batches whatever the size of their row groups, and only the needed columns.

Folder names such as `year=2026/month=3` (Hive partitions) are columns too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import InputError
from batchpipe.read.columns import BATCH_ROWS, RawBatch, Wanted
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.arrow import ArrowColumns, check_once
from batchpipe.read.formats.marked_files import MarkedFiles
from batchpipe.read.formats.promote import check_same_columns, promoted_schema

_READ_BYTES = 1 << 20  # pages are read through a buffer of this size, so that a huge row group is never held whole
_NULL = "__HIVE_DEFAULT_PARTITION__"  # how Hive writes null in the name of a folder


class ParquetReader:
    """A `Reader` of Parquet files of one schema, in their order, with the columns of Hive partition folders."""

    def __init__(self, files: Sequence[InputFile], wanted: Wanted) -> None:
        self._files = list(zip(files, file_names(files), strict=True))
        self._partitions = HivePartitions(files)
        self._num_rows = 0
        self._rows_read = 0
        schemas = [self._checked_schema(file) for file in files]
        schema = promoted_schema(schemas, [file.path for file in files])
        self._columns = ArrowColumns.choose(schema, wanted, files[0].path)
        self.id_column = self._columns.id_column
        self.carried_schema = self._columns.carried_schema
        names = {*self._columns.needed, *self.carried_schema.names}
        self._stored = sorted(names - set(self._partitions.schema.names))
        exactly = wanted.carry == "all"
        for file, found in zip(files, schemas, strict=True):
            check_same_columns(file, found.names, schema.names if exactly else names, exactly, first=files[0])
        self.marked = MarkedFiles(self._files)
        self.fingerprint = self.marked.fingerprint

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
                for read in parquet.iter_batches(BATCH_ROWS, columns=self._stored, use_threads=False):
                    batch = self._partitions.add_to(read, file)
                    yield self._columns.raw_batch(batch, name, first_row)
                    first_row += batch.num_rows
                    self._rows_read += batch.num_rows
            file.check_unchanged()

    def _checked_schema(self, file: InputFile) -> pa.Schema:
        """The file's own columns, followed by those of its partition folders; adds its rows to the count."""
        with _open_parquet(file) as parquet:
            schema = parquet.schema_arrow.remove_metadata()
            self._num_rows += parquet.metadata.num_rows
            _check_codecs(parquet.metadata, file)
        check_once(schema, file.path)
        for column in self._partitions.schema:
            if column.name in schema.names:
                raise InputError(
                    f"input.path: column {column.name!r} is in {file.path} and in the names of its folders"
                )
            schema = schema.append(column)
        return schema


@contextmanager
def _open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """Turns pyarrow's errors, on opening the file or reading it, into InputError."""
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


class HivePartitions:
    """The partition columns of a set of files: int64 if all values are whole numbers, else text."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._texts: dict[str, dict[str, str | None]] = {}
        for file in files:
            pairs = [folder.partition("=") for folder in file.relative.split("/")[:-1] if "=" in folder]
            self._texts[file.path] = {name: None if text == _NULL else unquote(text) for name, _, text in pairs}
        names = list(self._texts[files[0].path])
        for path, texts in self._texts.items():
            if list(texts) != names:
                raise InputError(
                    f"input.path: {path} lies in partition folders {list(texts)}, {files[0].path} in {names}"
                )
        self.schema = pa.schema([(name, _type_of([texts[name] for texts in self._texts.values()])) for name in names])

    def add_to(self, batch: pa.RecordBatch, file: InputFile) -> pa.RecordBatch:
        """`batch` with the file's partition values as further columns."""
        for column in self.schema:
            text = self._texts[file.path][column.name]
            value = int(text) if text is not None and pa.types.is_int64(column.type) else text
            values = pa.repeat(pa.scalar(value, column.type), batch.num_rows)
            batch = batch.append_column(column, values)
        return batch


def _type_of(texts: Sequence[str | None]) -> pa.DataType:
    given = [text for text in texts if text is not None]
    is_whole = bool(given) and all(_is_plain_int64(text) for text in given)
    return pa.int64() if is_whole else pa.string()


def _is_plain_int64(text: str) -> bool:
    """Whether an int64 is written exactly so, so that no information is lost by converting it (007 would lose some)."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(text)) == text and abs(int(text)) < 2**63
