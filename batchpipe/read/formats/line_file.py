"""Text files, plain or compressed, to lines. Only \\n ends a line, and one that is too long is never held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from batchpipe.errors import InputError, RowError
from batchpipe.read.files import InputFile

# Consecutive rows as objects, and by its position among them why a row cannot be read; the object of such a row is {}.
Parsed = tuple[list[dict[str, Any]], dict[int, RowError]]

BLOCK_BYTES = 262_144
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineFile:
    """An open text file, plain or compressed. `stored_position_bytes` counts stored (compressed) bytes read so far."""

    def __init__(self, file: InputFile, raw: pa.NativeFile, stream: pa.NativeFile) -> None:
        self._file = file
        self._raw = raw
        self._stream = stream
        self._head: bytes | None = None
        self._is_begun = False

    @property
    def stored_position_bytes(self) -> int:
        return int(self._raw.tell())

    def blocks(self, max_line_bytes: int) -> Iterator[list[bytes | None]]:
        """Runs of consecutive lines without their \\n, blank ones included; None stands for a line that is too long."""
        pieces: list[bytes] = []  # the beginning of a line that the last block did not end
        open_bytes = 0
        block = self.read(min(BLOCK_BYTES, max_line_bytes))
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
            block = self.read(min(BLOCK_BYTES, max_line_bytes))
        if open_bytes:
            yield [b"".join(pieces) if open_bytes <= max_line_bytes else None]

    def peek(self, num_bytes: int) -> bytes:
        """At most `num_bytes` at the beginning of the file, which the first `read` will give, too."""
        if self._head is None:
            self._head = self._read(min(BLOCK_BYTES, num_bytes)).removeprefix(_BYTE_ORDER_MARK)
        return self._head

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, without the mark of UTF-8 that a file may begin with; none at its end."""
        if self._is_begun:
            return self._read(num_bytes)
        self._is_begun = True
        return self.peek(num_bytes)

    def _read(self, num_bytes: int) -> bytes:
        try:
            return bytes(self._stream.read(num_bytes))
        except OSError as error:
            raise InputError(f"input.path: {self._file.path} is damaged or cut off: {error}") from error


@contextmanager
def open_lines(file: InputFile) -> Iterator[LineFile]:
    """Raises InputError as `open_bytes` does, and if the text is UTF-16."""
    with open_bytes(file) as (raw, stream):
        if raw is stream:
            head = raw.read(2)
            raw.seek(0)
            # A byte order mark shows UTF-16, and so does a zero beside an ASCII character.
            if head in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
                raise InputError(
                    f"input.path: {file.path} is UTF-16; text is read as UTF-8, convert it (iconv -f UTF-16 -t UTF-8)"
                )
        yield LineFile(file, raw, stream)


@contextmanager
def open_bytes(file: InputFile) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
    """(the bytes as stored, the bytes unpacked), which are the same file if nothing is packed.

    Raises InputError if the compression is not the one that the file's name says.
    """
    with file.open() as raw:
        head = raw.read(4)
        raw.seek(0)
        named = next((kind for suffix, kind in _SUFFIXES.items() if file.path.endswith(suffix)), None)
        found = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
        if named != found and file.size_bytes:
            is_in_fact = f"it holds {found} data" if found else f"it does not hold {named} data"
            raise InputError(f"input.path: {file.path} has the wrong suffix: {is_in_fact}; rename it")
        if found is None:
            yield raw, raw
        else:
            with pa.CompressedInputStream(raw, found) as stream:
                yield raw, stream
