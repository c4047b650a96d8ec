"""What a run did over its time, in a bounded number of samples, whatever its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

MOST_SAMPLES = 600
FIRST_INTERVAL_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The state of a run after `seconds` of generating. Counts are since its beginning, over all replicas.

    busy_seconds: in which stages computed, added up. Blocks are those in use, on the device and in host memory.
    """

    seconds: float
    rows: int
    prompt_tokens: int
    output_tokens: int
    running: int
    waiting: int
    device_blocks: int
    host_blocks: int
    busy_seconds: float


class Timeline:
    """Takes a sample every so often; when there are too many every second one goes, and the interval doubles."""

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self._now = now
        self._started = now()
        self._interval = FIRST_INTERVAL_SECONDS
        self._next = 0.0
        self._samples: list[Sample] = []

    def tick(self, sample: Callable[[float], Sample]) -> None:
        """Call often; `sample` is called, with the seconds so far, where one is due."""
        seconds = self._now() - self._started
        if seconds < self._next:
            return
        self._samples.append(sample(seconds))
        if len(self._samples) > MOST_SAMPLES:
            self._samples = self._samples[::2]
            self._interval *= 2
        self._next = seconds + self._interval

    def ended(self, sample: Callable[[float], Sample]) -> tuple[Sample, ...]:
        """All samples, the last one of now."""
        return (*self._samples, sample(self._now() - self._started))
