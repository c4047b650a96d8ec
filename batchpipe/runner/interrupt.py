"""Signals end a run in order: after the first the run stops and commits, and a second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from batchpipe.errors import InterruptedRunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupt:
    """Handles SIGNALS while the context is open; `requested` is the name of the first one received, else None.

    Outside the main thread (a notebook's worker, a server) Python cannot set handlers, so signals keep their effect.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            # Committed rows and the row log are on disk; nothing else is worth saving.
            os._exit(InterruptedRunError.exit_code)
        self.requested = signal.Signals(number).name
