"""How long a step computes: on a GPU between two moments of its stream, not of the host that tells it what to do."""

from __future__ import annotations

from time import perf_counter

import torch


class Stopwatch:
    """Starts when made."""

    def __init__(self, device: str) -> None:
        self._events = None
        if device != "cpu":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._started = self._stopped = perf_counter()

    def stop(self) -> None:
        self._stopped = perf_counter()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Waits for a GPU to reach the stop."""
        if self._events is None:
            return self._stopped - self._started
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3
