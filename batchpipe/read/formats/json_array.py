"""A `.json` file to rows: an array of objects, of which one at a time is held, or JSON lines under another name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from batchpipe.errors import InputError
from batchpipe.read.formats.json_lines import line_rows, parse_lines
from batchpipe.read.formats.line_file import BLOCK_BYTES, LineFile, Parsed

# A text as a whole; or, as the group, a mark outside of texts or the quote of a text that is not read to its end.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|(["\[\]{},])', re.DOTALL)
_UNENDED = b'"'


def json_rows(file: LineFile, name: str, max_row_bytes: int, once: Collection[str]) -> Iterator[Parsed]:
    """The rows of a JSON file; InputError if it is neither an array nor lines of objects, or its array is cut off."""
    head = file.peek(max_row_bytes).lstrip()
    if not head.startswith(b"["):
        rows, faults = parse_lines(head.split(b"\n"), 1, name, ())
        if 2 * len(faults) > len(rows):
            raise InputError(
                f"input.path: {name} is neither an array of objects, [{{...}}, {{...}}], nor JSON lines, an object "
                "a line; if its rows are inside of an object, take them out (jq .data x.json > rows.json)"
            )
        yield from line_rows(file, name, max_row_bytes, once)
        return
    first_item = 1
    for items in _items(file, name, max_row_bytes):
        yield parse_lines(items, first_item, name, once, unit="item")
        first_item += len(items)


def _items(file: LineFile, name: str, max_item_bytes: int) -> Iterator[list[bytes | None]]:
    """Runs of consecutive items of the array, each as its bytes; None stands for an item that is too long.

    Only brackets and texts are looked at: an item that is wrong inside is one wrong item.
    """
    pending, scanned, depth, is_long = b"", 0, 0, False  # `pending` begins with the item that is not complete
    while block := file.read(max(BLOCK_BYTES, len(pending))):  # more each time, or a long text is scanned too often
        pending += block
        found: list[bytes | None] = []
        start, stop = 0, len(pending)
        for token in _TOKEN.finditer(pending, scanned):
            mark = token[1]
            if mark is None and depth:
                continue
            if mark == _UNENDED:
                stop = token.start()
                break
            if depth == 0 and (mark != b"[" or pending[start : token.start()].strip()):
                raise _damaged(name)
            if mark in b"[{":
                depth += 1
                start = token.end() if depth == 1 else start
            elif mark in b",]" and depth == 1:
                item = pending[start : token.start()]
                found.append(None if is_long or len(item) > max_item_bytes else item)
                start, is_long = token.end(), False
            if mark in b"]}":
                depth -= 1
        yield found
        pending, scanned = pending[start:], stop - start
        if depth and len(pending) > max_item_bytes:
            pending, scanned, is_long = _without_scanned(pending, scanned), 0, True
    if depth or pending.strip():
        raise _damaged(name)


def _without_scanned(pending: bytes, scanned: int) -> bytes:
    """What must be kept of an item that nobody will read: of an open text its quote, and a backslash at its end."""
    if scanned == len(pending):
        return b""
    num_backslashes = len(pending) - len(pending.rstrip(b"\\"))
    return _UNENDED + b"\\" * (num_backslashes % 2)


def _damaged(name: str) -> InputError:
    return InputError(
        f"input.path: {name} is damaged or cut off: it is not one JSON array from its first [ to its last ]"
    )
