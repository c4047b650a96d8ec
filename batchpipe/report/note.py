"""What a run notes of itself every few seconds, for `batchpipe status` in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchpipe.errors import OutputError
from batchpipe.report.progress import Reading, seconds_left
from batchpipe.write.durable import writing

NOTE_NAME = "note.json"
NOTE_SECONDS = 5.0


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """One run, `seconds` after its first step.

    rows_total: of the input; an estimate where only reading all of it would tell. Tokens are those of this run.
    seconds_left: None as long as nothing can be said.
    """

    seconds: float
    rows_total: int
    rows_total_is_estimate: bool
    input_tokens: int
    output_tokens: int
    seconds_left: float | None


class NoteWriter:
    """Writes a note to the run's state folder when one is due; leave it as a context manager, which writes the last."""

    def __init__(
        self,
        folder: Path,
        rows_total: Callable[[], tuple[int, bool]],
        read: Callable[[], Reading],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rows_total: see `Note`, and whether it is an estimate."""
        self._path = folder / NOTE_NAME
        self._rows_total = rows_total
        self._read = read
        self._clock = clock
        self._started_seconds = self._due_seconds = clock()
        self._first: Reading | None = None

    def tick(self) -> None:
        """Writes if a note is due; else it only reads the clock."""
        if self._clock() >= self._due_seconds:
            self._due_seconds = self._clock() + NOTE_SECONDS
            self._write()

    def _write(self) -> None:
        reading, seconds = self._read(), self._clock() - self._started_seconds
        self._first = self._first or reading
        rows_total, is_estimate = self._rows_total()
        note = Note(
            seconds=seconds,
            rows_total=rows_total,
            rows_total_is_estimate=is_estimate,
            input_tokens=reading.input_tokens,
            output_tokens=reading.output_tokens,
            seconds_left=seconds_left(self._first, reading, seconds),
        )
        aside = self._path.with_suffix(".tmp")
        with writing(self._path):
            aside.write_bytes(msgspec.json.encode(note))
            aside.replace(self._path)  # a reader finds a whole note; a power cut may lose it

    def __enter__(self) -> NoteWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or not issubclass(kind, OutputError):  # a disk that refused rows takes no note
            self._write()


def read_note(folder: Path) -> Note | None:
    """The last note of the last run; None if there is none."""
    try:
        return msgspec.json.decode((folder / NOTE_NAME).read_bytes(), type=Note)
    except (OSError, msgspec.MsgspecError):
        return None
