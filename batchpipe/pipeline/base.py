"""The port between the scheduler and execution: a pipeline takes `Step`s and returns `StepResult`s in order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

from batchpipe.types import Capacity, Step, StepResult


class Pipeline(AbstractContextManager["Pipeline"], Protocol):
    """S stages of one model copy. At most `capacity.max_in_flight` steps are in flight.

    The next token of a sequence can be computed only after the step that sampled the token before it was collected;
    prefill chunks of one sequence may follow each other at once. Leaving the context ends every process and frees all
    memory.
    """

    @property
    def capacity(self) -> Capacity: ...

    @property
    def device_names(self) -> tuple[str, ...]:
        """One name per stage, of its GPU or processor."""
        ...

    def submit(self, step: Step) -> None:
        """Hands a step over and returns at once. Raises WorkerError if a stage is gone."""

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
        """Starts again with empty KV after a WorkerError; steps in flight are lost."""
