"""What a committed part is, and the log of committed parts.

A part is committed as soon as it has its final name: before, it was synced and read back under a temporary name. The
log spares a resumed run the reading of every part; a part without a record is read again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.write.crash import crash_point
from batchpipe.write.durable import sync, write_fully, write_whole, writing
from batchpipe.write.place import Place
from batchpipe.write.row_set import SUMMARIZED, Int64Array, Range, RowCounts, from_ranges, summarize, to_ranges

IDENTITY_KEY = "batchpipe.identity_sha256"

_HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A committed part: `num_rows` completions of the input rows in `row_ranges`."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str
    counts: RowCounts
    row_ranges: list[Range]

    @property
    def row_indexes(self) -> Int64Array:
        return from_ranges(self.row_ranges)


@dataclass(frozen=True, slots=True)
class _Line:
    crc32: int
    part: msgspec.Raw


def commit_part(
    batches: Sequence[pa.RecordBatch], schema: pa.Schema, temporary: Path, place: Place, name: str
) -> PartRecord:
    """Writes one part and gives it its final name in `place`; after a crash on the way it is absent or whole.

    Raises OutputError if the disk or store refuses, or if what is read back differs from what was written.
    """
    table = pa.Table.from_batches(batches, schema).combine_chunks()  # many small chunks are written three times slower
    with writing(temporary):
        pq.write_table(table, temporary, compression="zstd", compression_level=3, write_page_index=True)
        crash_point("after_tmp_write")
        sync(temporary)
    with writing(temporary), pa.OSFile(str(temporary)) as file:
        record = describe_part(file, str(temporary), {schema.metadata[IDENTITY_KEY.encode()]})
    if record.num_rows != sum(batch.num_rows for batch in batches):
        raise OutputError(f"{temporary}: holds other rows than were written to it; the disk is not to be trusted.")
    crash_point("before_rename")
    place.publish(temporary, name)
    crash_point("after_rename")
    return record


def describe_part(file: pa.NativeFile, path: str, identities: Collection[bytes]) -> PartRecord:
    """Reads a part. Raises OutputError if it is damaged, or its identity (sha256) is none of `identities`."""
    try:
        sha256 = hashlib.sha256()
        while block := file.read(_HASH_BYTES):
            sha256.update(block)
        file.seek(0)
        with pq.ParquetFile(file) as part:
            found = part.metadata.metadata or {}
            table = part.read(SUMMARIZED)
        num_bytes = file.size()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{path}: cannot be read as a part of the completions: {error}") from error
    if found.get(IDENTITY_KEY.encode()) not in identities:
        raise OutputError(f"{path}: belongs to another job; move it away, or start over with --fresh.")
    row_indexes, counts = summarize(table)
    name = path.rpartition("/")[2]
    return PartRecord(name, table.num_rows, num_bytes, sha256.hexdigest(), counts, to_ranges(row_indexes))


class CommitLog:
    """`commits.jsonl`: one line per committed part, each with its checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[list[PartRecord], bool]:
        """The readable records, and whether they are all that the file holds."""
        return read_commits(self._path.read_bytes() if self._path.exists() else b"")

    def append(self, record: PartRecord) -> None:
        with writing(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                write_fully(descriptor, _encode(record))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rewrite(self, records: Sequence[PartRecord]) -> None:
        write_whole(self._path, b"".join(map(_encode, records)))


def read_commits(data: bytes) -> tuple[list[PartRecord], bool]:
    """The readable records of a commit log's content, and whether they are all that it holds."""
    decoded = [_decode(line) for line in data.split(b"\n") if line]
    records = [record for record in decoded if record is not None]
    return records, len(records) == len(decoded) and (not data or data.endswith(b"\n"))


def _encode(record: PartRecord) -> bytes:
    part = msgspec.json.encode(record)
    return msgspec.json.encode(_Line(zlib.crc32(part), msgspec.Raw(part))) + b"\n"


def _decode(text: bytes) -> PartRecord | None:
    try:
        line = msgspec.json.decode(text, type=_Line)
        return msgspec.json.decode(line.part, type=PartRecord) if zlib.crc32(line.part) == line.crc32 else None
    except msgspec.MsgspecError:
        return None
