"""Files that survive a power cut: written whole under another name, synced, renamed, and their folder synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchpipe.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system (disk full, device error, no permission) into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}. What is committed stays as it is; "
            "once this is mended the same command continues."
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`; a reader, also one after a crash, finds the old content or the new, never a mixture.

    Raises OutputError if the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Renames a synced file to its final name, and syncs the folder so that the name survives a power cut."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, data: bytes) -> None:
    """Repeats `os.write` until all of `data` is written: on a nearly full disk one call writes only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def to_json(value: Mapping[str, Any]) -> bytes:
    """The content of a small file that people may want to read."""
    return json.dumps(value, indent=2).encode() + b"\n"
