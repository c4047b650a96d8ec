"""A process per stage: the controller sends every step to all stages and hears from all of them.

            controller (no device context)
   Step  │          │ Step        ▲ tokens of the oldest step, seconds of every stage
         ▼          ▼             │
      stage 0 ─▶ stage 1 ─▶ ... stage S-1

Every stage runs its steps in the order they were sent. After a WorkerError `restart` starts new processes.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.messages import Computed, Sampled, merge_corrupt
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.worker import Transport
from batchpipe.pipeline.workers import DEFAULT_LIMITS, Limits, WorkerGroup
from batchpipe.types import Capacity, Step, StepResult


class MultiprocessPipeline:
    """See `Pipeline`; made by `open`."""

    @classmethod
    def open(
        cls,
        replicas: Sequence[Sequence[StageSpec]],
        capacity_of: Callable[[Sequence[StageMemory]], Capacity],
        transport: Transport = "shared_memory",
        limits: Limits = DEFAULT_LIMITS,
    ) -> list[MultiprocessPipeline]:
        """A pipeline of each replica's stages. The workers of all replicas load side by side.

        capacity_of: turns what the loaded stages of a replica report into the capacity to offer.
        transport: `shared_memory` between processes of one host, `nccl` between GPUs, `gloo` where neither can be had.
        Raises ModelError, MemoryLimitError or WorkerError; no process is left then.
        """
        with ExitStack() as stack:
            groups = [stack.enter_context(closing(WorkerGroup(specs, transport, limits))) for specs in replicas]
            pipelines = []
            for workers in groups:
                capacity = capacity_of(workers.load())
                workers.allocate(capacity)
                pipelines.append(cls(workers, capacity))
            stack.pop_all()
        return pipelines

    def __init__(self, workers: WorkerGroup, capacity: Capacity) -> None:
        self.capacity = capacity
        self._workers = workers
        self._in_flight: deque[int] = deque()
        self._computed: list[deque[Computed]] = [deque() for _ in range(capacity.num_stages)]
        self._sampled: deque[Sampled] = deque()

    def __enter__(self) -> MultiprocessPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._workers.close()

    @property
    def device_names(self) -> tuple[str, ...]:
        return self._workers.device_names

    @property
    def worker_pids(self) -> list[int]:
        return self._workers.pids

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        self._in_flight.append(step.step_id)
        self._workers.send(step)

    def collect(self) -> StepResult:
        step_id = self._in_flight[0]
        while not self._is_complete:
            self._hear(wait=True)
        self._in_flight.popleft()
        stages, sampled = [queue.popleft() for queue in self._computed], self._sampled.popleft()
        assert {sampled.step_id, *(stage.step_id for stage in stages)} == {step_id}, "stages are out of step"
        return StepResult(
            step_id,
            sampled.token_ids,
            sampled.logprobs,
            tuple(stage.seconds for stage in stages),
            tuple(stage.link_use for stage in stages if stage.link_use is not None),
            merge_corrupt(stage.corrupt for stage in stages),
            sampled.seconds,
        )

    def ready(self) -> bool:
        while not self._is_complete and self._hear(wait=False):
            pass
        return self._is_complete

    def wait(self, timeout_seconds: float, others: Sequence[MultiprocessPipeline] = ()) -> bool:
        with selectors.DefaultSelector() as selector:
            for pipeline in (self, *others):
                for end in pipeline._workers.sockets:
                    selector.register(end, selectors.EVENT_READ)
            return bool(selector.select(timeout_seconds))

    def restart(self) -> None:
        self._in_flight.clear()
        self._sampled.clear()
        self._computed = [deque() for _ in self._computed]
        self._workers = self._workers.restarted()
        self._workers.load()
        self._workers.allocate(self.capacity)

    @property
    def _is_complete(self) -> bool:
        """Everything about the oldest step in flight is here."""
        return bool(self._sampled) and all(self._computed)

    def _hear(self, *, wait: bool) -> bool:
        """Takes in what the stages have sent; False if there is nothing. Waiting ends with an error at the limit."""
        limit_seconds = self._workers.limits.step_seconds
        answers = self._workers.hear(limit_seconds if wait else 0.0)
        if wait and not answers:
            silent = next((i for i, queue in enumerate(self._computed) if not queue), len(self._computed) - 1)
            self._workers.silent(silent, "computing a step", limit_seconds)
        for index, answer in answers:
            if isinstance(answer, Sampled):
                self._sampled.append(answer)
            else:
                assert isinstance(answer, Computed), f"a {type(answer).__name__} between steps"
                self._computed[index].append(answer)
        return bool(answers)
