"""The row log: finished rows on disk before their part is full.

A log is a chain of frames: magic, payload bytes, crc32 of the payload, payload. The payloads of one log, put one after
the other, are one Arrow IPC stream, whose schema opens the first. A crash can tear the last frame, never another.
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
    """A log being written. One thread appends; another may sync, and closes it once nothing is appended any more."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._payload = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._payload, schema)
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def append(self, batch: pa.RecordBatch) -> None:
        """Survives the death of the process when this returns, and a power cut after the next `sync`."""
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


def read_log(path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The rows of a log, less a torn last frame.

    Raises OutputError where a damaged frame stands before a whole one, or the rows have other columns than `schema`.
    """
    with writing(path):
        data = path.read_bytes()
    stream = b"".join(_payloads(path, data))
    if not stream:
        return []
    reader = pa.ipc.open_stream(stream)
    if not reader.schema.equals(schema):
        raise OutputError(f"{path}: holds rows with other columns than this job's; start over with --fresh.")
    return list(reader)


def _payloads(path: Path, data: bytes) -> Iterator[bytes]:
    offset = 0
    while (payload := _payload_at(data, offset)) is not None:
        yield payload
        offset += _HEADER.size + len(payload)
    following = data.find(MAGIC, offset + 1)
    while following != -1:
        if _payload_at(data, following) is not None:
            raise OutputError(
                f"{path}: damaged at byte {offset}, with good rows behind it at byte {following}; the disk lost what "
                "was written. Delete this file to compute its rows again, or start over with --fresh."
            )
        following = data.find(MAGIC, following + 1)


def _payload_at(data: bytes, offset: int) -> bytes | None:
    """The payload of the frame at `offset`, None where no whole frame stands there."""
    if len(data) - offset < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(data, offset)
    payload = data[offset + _HEADER.size : offset + _HEADER.size + length]
    if magic != MAGIC or len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    return payload
