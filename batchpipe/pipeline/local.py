"""All stages in this process, one after the other: the pipeline of one device, and the reference for the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter

from torch import Tensor

from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.messages import merge_corrupt
from batchpipe.pipeline.stage import Stage, StageSpec, sampler_of
from batchpipe.types import Capacity, Step, StepResult


class LocalPipeline:
    """See `Pipeline`. `capacity_of` turns what the loaded stages report into the capacity to offer."""

    def __init__(self, specs: Sequence[StageSpec], capacity_of: Callable[[Sequence[StageMemory]], Capacity]) -> None:
        self._stages = [Stage(spec) for spec in specs]
        self._sampler = sampler_of(specs[-1])
        self.device_names = tuple(stage.device_name for stage in self._stages)
        self.capacity = capacity_of(
            [StageMemory(s.free_bytes, s.bytes_per_block, s.block_tokens) for s in self._stages]
        )
        self._in_flight: deque[Step] = deque()
        for stage in self._stages:
            stage.allocate(self.capacity.num_blocks, self.capacity.num_host_blocks, self.capacity.streams_per_block)

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for stage in self._stages:
            stage.close()
        self._stages.clear()

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        self._in_flight.append(step)
        for stage in self._stages:
            stage.announce(step)

    def collect(self) -> StepResult:
        step = self._in_flight.popleft()
        output: Tensor | None = None
        times = [perf_counter()]
        for stage in self._stages:
            output = stage.run(step, output)
            times.append(perf_counter())
        assert output is not None and self._sampler is not None
        tokens = self._sampler.sample_step(step, output)
        sampling_seconds = perf_counter() - times[-1]
        uses = [stage.link_use for stage in self._stages]
        return StepResult(
            step.step_id,
            tokens.token_ids,
            tokens.logprobs,
            tuple(end - start for start, end in pairwise(times)),
            tuple(use for use in uses if use is not None),
            merge_corrupt(stage.corrupt for stage in self._stages),
            sampling_seconds,
        )

    def ready(self) -> bool:
        return bool(self._in_flight)

    def wait(self, timeout_seconds: float, others: Sequence[LocalPipeline] = ()) -> bool:
        return True

    def restart(self) -> None:
        raise AssertionError("there is no process here that could be lost")
