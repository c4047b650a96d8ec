"""Bytes of a JSONL file to lines. A line ends at \\n and nowhere else; what is too long is never held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from batchpipe.errors import InputError
from batchpipe.read.files import InputFile

BLOCK_BYTES = 262_144
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineFile:
    """An open JSONL file, plain or compressed. `stored_position_bytes` is how far the stored bytes are read."""

    def __init__(self, file: InputFile, raw: pa.NativeFile, stream: pa.NativeFile) -> None:
        self._file = file
        self._raw = raw
        self._stream = stream

    @property
    def stored_position_bytes(self) -> int:
        return int(self._raw.tell())

    def blocks(self, max_line_bytes: int) -> Iterator[list[bytes | None]]:
        """Runs of consecutive lines, without their \\n, blank ones included; None for a line that is too long."""
        pieces: list[bytes] = []  # of the line that the last block left open
        open_bytes = 0
        block = self._read(min(BLOCK_BYTES, max_line_bytes)).removeprefix(_BYTE_ORDER_MARK)
        while block:
            first, *others = block.split(b"\n")
            open_bytes += len(first)
            if open_bytes <= max_line_bytes:
                pieces.append(first)
            else:
                pieces.clear()
            if others:
                *whole, last = others
                yield [b"".join(pieces) if open_bytes <= max_line_bytes else None, *whole]
                pieces, open_bytes = [last], len(last)
            block = self._read(min(BLOCK_BYTES, max_line_bytes))
        if open_bytes:
            yield [b"".join(pieces) if open_bytes <= max_line_bytes else None]

    def _read(self, num_bytes: int) -> bytes:
        try:
            return bytes(self._stream.read(num_bytes))
        except OSError as error:
            raise InputError(f"input.path: {self._file.path} is damaged or cut off: {error}") from error


@contextmanager
def open_lines(file: InputFile) -> Iterator[LineFile]:
    """InputError where the file is compressed otherwise than its name says, or is not UTF-8 at all."""
    with file.open() as raw:
        head = raw.read(4)
        raw.seek(0)
        named = next((kind for suffix, kind in _SUFFIXES.items() if file.path.endswith(suffix)), None)
        found = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
        if named != found and file.size_bytes:
            is_in_fact = f"it holds {found} data" if found else f"it does not hold {named} data"
            raise InputError(f"input.path: {file.path} has the wrong suffix: {is_in_fact}; rename it")
        if found is None:
            _check_not_utf16(head, file.path)
            yield LineFile(file, raw, raw)
        else:
            with pa.CompressedInputStream(raw, found) as stream:
                yield LineFile(file, raw, stream)


def _check_not_utf16(head: bytes, path: str) -> None:
    has_mark = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    if has_mark or b"\0" in head[:2]:  # JSON begins with ASCII, whose other byte is then zero
        raise InputError(f"input.path: {path} is UTF-16; JSON Lines are UTF-8, convert it (iconv -f UTF-16 -t UTF-8)")
