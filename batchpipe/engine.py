"""Planner and pipeline as one thing: requests go in, finished requests come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from time import perf_counter

from batchpipe.errors import WorkerError
from batchpipe.execute.base import Pipeline
from batchpipe.plan.planner import Planner
from batchpipe.plan.sequence import StopMatcher
from batchpipe.report.meter import Meter
from batchpipe.sample.rng import stream_of
from batchpipe.types import FinishedRequest, Request, SamplingParams, Step, StepResult

logger = logging.getLogger(__name__)

# Requests that wait, read and tokenised, for each sequence that may run: enough that the engine never starves.
WAITING_PER_RUNNING = 2


class Engine:
    """Keeps the pipeline full with the planner's steps. Survives the loss of a worker once."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: str,
        eos_token_ids: frozenset[int],
        matcher_of: Callable[[SamplingParams], StopMatcher | None],
    ) -> None:
        capacity = pipeline.capacity
        self.planner = Planner(capacity, schedule, eos_token_ids, stream_of, matcher_of)
        self.meter = Meter(capacity.num_stages)
        self.planner_seconds = 0.0
        self._pipeline = pipeline
        self._window = WAITING_PER_RUNNING * capacity.max_batches * capacity.max_batch_sequences
        self._num_new_prompt_tokens = 0
        self._restarted = False

    @property
    def idle(self) -> bool:
        return self.planner.idle

    @property
    def device_names(self) -> tuple[str, ...]:
        return self._pipeline.device_names

    @property
    def room(self) -> int:
        """How many more requests should wait in line."""
        return max(0, self._window - self.planner.num_waiting)

    def add(self, requests: Iterable[Request]) -> None:
        self.planner.add(requests)

    def advance(self) -> list[FinishedRequest]:
        """Submits what fits, waits for the oldest step in flight, and gives the requests that ended with it."""
        while self.planner.num_in_flight < self._pipeline.capacity.max_batches and (step := self._plan()):
            self._submit(step)
        if self.planner.num_in_flight:
            self._collect()
        return self.planner.take_finished()

    def _plan(self) -> Step | None:
        started = perf_counter()
        step = self.planner.next_step()
        self.planner_seconds += perf_counter() - started
        return step

    def _submit(self, step: Step) -> None:
        try:
            self._pipeline.submit(step)
        except WorkerError as error:
            self._restart(error)
            return
        first_time = (start for start in step.started if not start.generated_token_ids)
        self._num_new_prompt_tokens += sum(len(start.prompt_token_ids) for start in first_time)

    def _collect(self) -> None:
        try:
            result = self._pipeline.collect()
        except WorkerError as error:
            self._restart(error)
            return
        self._record(result)

    def _record(self, result: StepResult) -> None:
        started = perf_counter()
        self.planner.record(result)
        self.planner_seconds += perf_counter() - started
        self.meter.add_step(result, self._num_new_prompt_tokens, len(result.token_ids))
        self._num_new_prompt_tokens = 0

    def _restart(self, error: WorkerError) -> None:
        """The controller holds every token, so only KV is lost; a second loss is not an accident any more."""
        if self._restarted:
            raise error
        self._restarted = True
        logger.warning("%s; starting the pipeline again, rows in flight are computed anew", error)
        self._pipeline.restart()
        self.planner.requeue_all()
