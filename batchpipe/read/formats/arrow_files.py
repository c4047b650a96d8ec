"""Arrow IPC: the file form (Feather, pandas, Polars) and the stream form (`datasets`), told apart by their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs, ipc

from batchpipe.errors import InputError
from batchpipe.read.columns import BATCH_ROWS, RawBatch, Wanted
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.arrow import ArrowColumns, check_once
from batchpipe.read.formats.line_file import open_bytes
from batchpipe.read.formats.marked_files import MarkedFiles
from batchpipe.read.formats.promote import check_same_columns, promoted_schema

_FILE_MAGIC = b"ARROW1"


class ArrowFilesReader:
    """A `Reader` of Arrow IPC files, in their order; of each one record batch is held at a time."""

    def __init__(self, files: Sequence[InputFile], wanted: Wanted) -> None:
        self._files = list(zip(files, file_names(files), strict=True))
        self._total_bytes = sum(file.size_bytes for file in files)
        self._consumed_bytes = 0.0
        self._num_rows: int | None = None
        schemas = [_schema_of(file) for file in files]
        schema = promoted_schema(schemas, [file.path for file in files])
        self._columns = ArrowColumns.choose(schema, wanted, files[0].path)
        self.id_column = self._columns.id_column
        self.carried_schema = self._columns.carried_schema
        exactly = wanted.carry == "all"
        names = {*self._columns.needed, *self.carried_schema.names}
        for file, found in zip(files, schemas, strict=True):
            check_same_columns(file, found.names, schema.names if exactly else names, exactly, first=files[0])
        self._names = sorted(names)
        self.marked = MarkedFiles(self._files)
        self.fingerprint = self.marked.fingerprint

    @property
    def progress(self) -> float:
        return self._consumed_bytes / self._total_bytes if self._total_bytes else 1.0

    def num_rows(self) -> int | None:
        """Counted where files are local and plain, whose values need not be read for it."""
        if self._num_rows is None and all(_is_mappable(file) for file, _ in self._files):
            self._num_rows = sum(_count(file) for file, _ in self._files)
        return self._num_rows

    def batches(self) -> Iterator[RawBatch]:
        finished_bytes = 0.0
        for file, name in self._files:
            first_row = 1
            with _open_ipc(file) as opened:
                for stored, fraction in opened.batches():
                    self._consumed_bytes = finished_bytes + fraction * file.size_bytes
                    chosen = stored.select(self._names)
                    for start in range(0, chosen.num_rows, BATCH_ROWS):
                        batch = chosen.slice(start, BATCH_ROWS)
                        yield self._columns.raw_batch(batch, name, first_row)
                        first_row += batch.num_rows
            file.check_unchanged()
            finished_bytes += file.size_bytes
        self._consumed_bytes = finished_bytes


@dataclass(frozen=True, slots=True)
class _Ipc:
    """An open file of either form."""

    file: InputFile
    raw: pa.NativeFile
    reader: ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader

    def batches(self) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Every record batch, and the fraction of the file that is read with it."""
        if isinstance(self.reader, ipc.RecordBatchFileReader):
            for place in range(self.reader.num_record_batches):
                yield self.reader.get_batch(place), (place + 1) / self.reader.num_record_batches
        else:
            for batch in self.reader:
                yield batch, self.raw.tell() / self.file.size_bytes


@contextmanager
def _open_ipc(file: InputFile, *, mapped: bool = False) -> Iterator[_Ipc]:
    """Turns pyarrow's errors, on opening the file or reading it, into InputError. mapped: values stay on the disk."""
    with ExitStack() as stack:
        if mapped:
            raw = source = stack.enter_context(pa.memory_map(file.path))
        else:
            raw, source = stack.enter_context(open_bytes(file))
        try:
            if raw is not source:
                yield _Ipc(file, raw, stack.enter_context(ipc.open_stream(source)))
                return
            is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
            source.seek(0)
            yield _Ipc(file, raw, stack.enter_context((ipc.open_file if is_file else ipc.open_stream)(source)))
        except (OSError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            hint = (
                "; only the stream form of Arrow can be read compressed, unpack the file" if raw is not source else ""
            )
            raise InputError(f"input.path: {file.path} cannot be read as Arrow: {reason}{hint}") from error


def _schema_of(file: InputFile) -> pa.Schema:
    with _open_ipc(file) as opened:
        schema = opened.reader.schema.remove_metadata()
    check_once(schema, file.path)
    return schema


def _is_mappable(file: InputFile) -> bool:
    return isinstance(file.filesystem, fs.LocalFileSystem) and not file.path.endswith((".gz", ".zst"))


def _count(file: InputFile) -> int:
    with _open_ipc(file, mapped=True) as opened:
        return sum(batch.num_rows for batch, _ in opened.batches())
