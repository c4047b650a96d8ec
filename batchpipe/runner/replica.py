"""One model copy at work: a pipeline, and the scheduler that keeps it full. Survives the loss of a worker once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from batchpipe.cost.model import CostModel, StepWork
from batchpipe.cost.online import OnlineCost
from batchpipe.errors import WorkerError
from batchpipe.pipeline.base import Pipeline
from batchpipe.report.meter import Meter
from batchpipe.report.trace import StepTrace
from batchpipe.sample.rng import stream_of
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.scheduler.sequence import StopMatcher
from batchpipe.types import FinishedRequest, Request, Step

logger = logging.getLogger(__name__)


class Replica:
    """`submit`, wait until `ready`, `collect`, which returns the requests that ended."""

    def __init__(
        self,
        index: int,
        pipeline: Pipeline,
        meter: Meter,
        schedule: str,
        eos_token_ids: frozenset[int],
        matcher_of: Callable[[Request], StopMatcher | None],
        cost: CostModel | None = None,
        trace: StepTrace | None = None,
    ) -> None:
        capacity = pipeline.capacity
        self.scheduler = Scheduler(capacity, schedule, eos_token_ids, stream_of, matcher_of, cost)
        self.planner_seconds = 0.0
        self.max_running = capacity.max_batches * capacity.max_batch_sequences
        self._index = index
        self._pipeline = pipeline
        self._meter = meter
        self._trace = trace
        self._online_cost = cost if isinstance(cost, OnlineCost) else None
        self._works: deque[StepWork] = deque()  # of the steps in flight, if a cost model learns from them
        self._num_new_prompt_tokens = 0
        self._restarted = False

    @property
    def device_names(self) -> tuple[str, ...]:
        return self._pipeline.device_names

    @property
    def num_open(self) -> int:
        """Sequences that run or wait."""
        return self.scheduler.num_waiting + self.scheduler.num_running

    @property
    def busy(self) -> bool:
        """A step is in flight."""
        return self.scheduler.num_in_flight > 0

    def add(self, requests: Sequence[Request]) -> None:
        self.scheduler.add(requests)

    def submit(self) -> None:
        """Hands steps to the pipeline until it is full or the scheduler has none."""
        while self.scheduler.has_room and (step := self._plan()):
            try:
                self._pipeline.submit(step)
            except WorkerError as error:
                self._restart(error)
                continue
            if self._trace is not None:
                self._trace.submitted(self._index, step)
            if self._online_cost is not None:
                self._works.append(StepWork.of_step(step))
            first_time = (start for start in step.started if not start.generated_token_ids)
            self._num_new_prompt_tokens += sum(len(start.prompt_token_ids) for start in first_time)

    def ready(self) -> bool:
        """Whether `collect` would return at once; it does after a lost worker, because nothing is in flight then."""
        try:
            return self._pipeline.ready()
        except WorkerError as error:
            self._restart(error)
            return True

    def wait(self, timeout_seconds: float, others: Sequence[Replica]) -> bool:
        """See `Pipeline.wait`."""
        return self._pipeline.wait(timeout_seconds, [replica._pipeline for replica in others])

    def collect(self) -> list[FinishedRequest]:
        """Waits for the oldest step in flight, if there is one, and returns the requests that ended."""
        if self.busy:
            self._collect()
        return self.scheduler.take_finished()

    def _plan(self) -> Step | None:
        started = perf_counter()
        step = self.scheduler.next_step()
        self.planner_seconds += perf_counter() - started
        return step

    def _collect(self) -> None:
        try:
            result = self._pipeline.collect()
        except WorkerError as error:
            self._restart(error)
            return
        started = perf_counter()
        self.scheduler.record(result)
        if self._online_cost is not None:
            self._online_cost.observe(self._works.popleft(), result.stage_seconds, result.link_uses)
        self.planner_seconds += perf_counter() - started
        self._meter.add_step(result, self._num_new_prompt_tokens, len(result.token_ids), self._index)
        self._num_new_prompt_tokens = 0
        if self._trace is not None:
            self._trace.ended(self._index, result, self.scheduler)

    def _restart(self, error: WorkerError) -> None:
        """The controller holds every token, so only KV is lost. A second loss is taken for a fault, and raised."""
        if self._restarted:
            raise error
        self._restarted = True
        logger.warning("%s; starting the pipeline again, rows in flight are computed anew", error)
        self._works.clear()
        if self._trace is not None:
            self._trace.forget(self._index)
        self._pipeline.restart()
        self.scheduler.requeue_all()
