"""The port between deciding and doing: a pipeline takes `Step`s and gives `StepResult`s, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

from batchpipe.types import Capacity, Step, StepResult


class Pipeline(AbstractContextManager["Pipeline"], Protocol):
    """S stages of one model copy. At most `capacity.max_in_flight` steps are in flight.

    A step's sequences may draw their next token only after the step before it was collected; prefill chunks of one
    sequence may follow each other at once. Leaving the context ends every process and frees all memory.
    """

    @property
    def capacity(self) -> Capacity: ...

    @property
    def device_names(self) -> tuple[str, ...]:
        """What the stages run on, one name a stage."""
        ...

    def submit(self, step: Step) -> None:
        """Hands a step over without waiting for it."""

    def collect(self) -> StepResult:
        """The result of the oldest step in flight; waits for it. Raises WorkerError if a stage is gone."""

    def ready(self) -> bool:
        """Whether `collect` has its result without waiting for another process. Raises WorkerError."""
        ...

    def wait(self, timeout_seconds: float, others: Sequence[Self] = ()) -> bool:
        """Sleeps until this pipeline or one of `others`, of the same kind, may be ready; False after the time-out.

        A pipeline whose `collect` itself computes never waits.
        """
        ...

    def restart(self) -> None:
        """Starts over with empty KV after a WorkerError; steps in flight are lost."""
