"""How long steps are predicted to take on the slowest stage, which is the time the link has to carry KV."""

from __future__ import annotations

from collections import deque
from math import ceil
from statistics import fmean

from batchpipe.cost.model import StepWork, bottleneck_seconds
from batchpipe.scheduler.state import SchedulerState
from batchpipe.types import Step


class StepTime:
    """`foresee` is told every planned step. Seconds are None where there is no cost model."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._decode_seconds: deque[float] = deque(maxlen=state.capacity.max_batches)
        self.last_seconds: float | None = None  # of the step planned last
        self.last_num_decodes = 0  # of the last one that decodes

    def foresee(self, step: Step, num_decodes: int) -> None:
        """num_decodes: the step's sequences that have drawn a token before."""
        if self._state.cost is None:
            return
        self.last_seconds = bottleneck_seconds(self._state.cost, StepWork.of_step(step))
        if num_decodes:
            self._decode_seconds.append(self.last_seconds)
            self.last_num_decodes = num_decodes

    def seconds_of(self, num_decodes: int, num_prefill_tokens: int) -> float | None:
        """Of a step whose decodes have the mean context of the running sequences."""
        state = self._state
        if state.cost is None or not state.running:
            return None
        context_tokens = state.context_tokens * num_decodes // len(state.running)
        work = StepWork(num_decodes + num_prefill_tokens, num_decodes, num_decodes, context_tokens, 0)
        return bottleneck_seconds(state.cost, work)

    @property
    def decode_seconds(self) -> float | None:
        """Of a step that decodes: the mean over the last round of batches."""
        if self._decode_seconds:
            return fmean(self._decode_seconds)
        return self.seconds_of(ceil(len(self._state.running) / self._state.capacity.max_batches), 0)
