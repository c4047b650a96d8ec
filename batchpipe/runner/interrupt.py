"""Signals that end a run in order: the first asks it to stop, commit and leave; a second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from batchpipe.errors import InterruptedRunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupt:
    """Listens while the context is open; `requested` names the signal once one came, else None.

    Outside the main thread (a notebook's worker, a server) Python cannot listen, and signals keep their meaning.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            # What is committed, and what is in the row log, stays; there is nothing else to save.
            os._exit(InterruptedRunError.exit_code)
        self.requested = signal.Signals(number).name
