"""The row log: finished rows on disk before their part is full.

A log is a sequence of frames, each of which holds a magic number, the payload's length in bytes, the payload's crc32
and the payload. The payloads of one log, concatenated, are one Arrow IPC stream; the first one begins with the schema.
A crash can tear only the last frame.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from batchpipe.errors import OutputError
from batchpipe.write.durable import sync, write_fully, writing

MAGIC = b"BPRL"
_HEADER = struct.Struct("<4sII")


class RowLog:
    """A log being written. One thread appends; another may sync, and closes the log after the last append."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._payload = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._payload, schema)
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def append(self, batch: pa.RecordBatch) -> None:
        """The batch survives the death of the process once this returns, and a power cut after the next `sync`."""
        self._stream.write_batch(batch)
        payload = self._payload.getvalue()
        self._payload.seek(0)
        self._payload.truncate()
        with writing(self.path):
            write_fully(self._descriptor, _HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload)

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._descriptor)
            sync(self.path.parent)

    def close(self) -> None:
        os.close(self._descriptor)


def read_log(path: Path, schema: pa.Schema | None = None) -> list[pa.RecordBatch]:
    """The batches of a log, without a torn last frame; any columns will do without a `schema`.

    Raises OutputError if a whole frame follows a damaged one, or if the rows have other columns than `schema`.
    """
    with writing(path):
        data = path.read_bytes()
    stream = b"".join(_payloads(path, data))
    if not stream:
        return []
    reader = pa.ipc.open_stream(stream)
    if schema is not None and not reader.schema.equals(schema):
        raise OutputError(f"{path}: holds rows with other columns than this job's; start over with --fresh.")
    return list(reader)


def _payloads(path: Path, data: bytes) -> Iterator[bytes]:
    offset = 0
    while (payload := _payload_at(data, offset)) is not None:
        yield payload
        offset += _HEADER.size + len(payload)
    following = offset
    while (following := data.find(MAGIC, following + 1)) != -1:
        if _payload_at(data, following) is not None:
            raise OutputError(
                f"{path}: damaged at byte {offset}, with good rows behind it at byte {following}; the disk lost what "
                "was written. Delete this file to compute its rows again, or start over with --fresh."
            )


def _payload_at(data: bytes, offset: int) -> bytes | None:
    """The payload of the frame that begins at `offset`; None if no whole frame does."""
    if len(data) - offset < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(data, offset)
    payload = data[offset + _HEADER.size : offset + _HEADER.size + length]
    return payload if magic == MAGIC and len(payload) == length and zlib.crc32(payload) == checksum else None
