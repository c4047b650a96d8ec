"""Progress on stderr: a line that is redrawn on a terminal, `tqdm` in a notebook, else a plain line every few seconds.

Nothing is coloured, so NO_COLOR is respected.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TextIO

TERMINAL_SECONDS = 0.2
PLAIN_SECONDS = 5.0
WINDOW_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows of the job so far, tokens of this run, and the fraction of the job's work that is done (None: unknown)."""

    rows_done: int = 0
    rows_failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    fraction: float | None = None


def seconds_left(first: Reading, now: Reading, seconds: float) -> float | None:
    """For the rest of the job, from the fraction done in the `seconds` between two readings; None if none was."""
    if first.fraction is None or now.fraction is None or now.fraction <= first.fraction:
        return None
    return seconds * (1 - now.fraction) / (now.fraction - first.fraction)


class Progress:
    """Shows how far a run is. `total_rows` is None if unknown. `read` is called when a line is due, and at the end."""

    def __init__(
        self,
        total_rows: int | None,
        read: Callable[[], Reading],
        stream: TextIO | None = None,  # None: stderr
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._total_rows = total_rows
        self._read = read
        self._first: tuple[float, Reading] | None = None
        self._window: deque[tuple[float, Reading]] = deque()
        self._started_seconds = clock()
        self._show, self._finish, self._every_seconds = self._choose_display()
        self._due_seconds = self._started_seconds

    def tick(self) -> None:
        """Shows a reading if one is due; else it only reads the clock."""
        now_seconds = self._clock()
        if now_seconds >= self._due_seconds:
            self._due_seconds = now_seconds + self._every_seconds
            self._take_reading(now_seconds)

    def _take_reading(self, now_seconds: float) -> None:
        reading = self._read()
        self._first = self._first or (now_seconds, reading)
        self._window.append((now_seconds, reading))
        while now_seconds - self._window[0][0] > WINDOW_SECONDS:
            self._window.popleft()
        self._show(reading)

    def _line(self, reading: Reading) -> str:
        rows = f"{reading.rows_done:,} rows"
        if self._total_rows is None and reading.fraction is not None:
            rows += f" ({reading.fraction:.1%})"  # of the work, by how much of the input has been read
        elif self._total_rows is not None:
            share = reading.rows_done / self._total_rows if self._total_rows else 1.0
            rows = f"{reading.rows_done:,} of {self._total_rows:,} rows ({share:.1%})"
        return f"{rows}, {self._details(reading)}"

    def _details(self, reading: Reading) -> str:
        now_seconds, _ = self._window[-1]
        oldest_seconds, oldest = self._window[0] if len(self._window) > 1 else (self._started_seconds, Reading())
        recent_seconds = max(now_seconds - oldest_seconds, 1e-9)
        input_rate = (reading.input_tokens - oldest.input_tokens) / recent_seconds
        output_rate = (reading.output_tokens - oldest.output_tokens) / recent_seconds
        overall_rate = reading.output_tokens / max(now_seconds - self._started_seconds, 1e-9)
        line = f"{reading.rows_failed:,} failed | tokens/s: {input_rate:,.0f} in, {output_rate:,.0f} out"
        return f"{line} ({overall_rate:,.0f} overall){self._time_left(reading, now_seconds)}"

    def _time_left(self, reading: Reading, now_seconds: float) -> str:
        """Extrapolated from the fraction that this run has done so far, without that of earlier runs."""
        assert self._first is not None
        first_seconds, first = self._first
        left = seconds_left(first, reading, now_seconds - first_seconds)
        return "" if left is None else f" | {timedelta(seconds=round(left))} left"

    def _choose_display(self) -> tuple[Callable[[Reading], None], Callable[[], None], float]:
        """(function that shows a reading, function that ends the display, seconds between two readings)."""
        if "ipykernel" in sys.modules:
            return *self._notebook_display(), TERMINAL_SECONDS
        if self._stream.isatty():
            return self._redraw, lambda: self._emit("\n"), TERMINAL_SECONDS
        return self._log, lambda: None, PLAIN_SECONDS

    def _notebook_display(self) -> tuple[Callable[[Reading], None], Callable[[], None]]:
        from tqdm.auto import tqdm

        bar = tqdm(total=self._total_rows, file=self._stream, unit="row")

        def show(reading: Reading) -> None:
            bar.n = reading.rows_done
            bar.set_postfix_str(self._details(reading))

        return show, bar.close

    def _log(self, reading: Reading) -> None:
        self._emit(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._line(reading)}\n")

    def _redraw(self, reading: Reading) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._emit("\r" + self._line(reading)[:width].ljust(width))

    def _emit(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        """Shows the last reading."""
        self._take_reading(self._clock())
        self._finish()
