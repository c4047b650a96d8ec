"""How long steps are predicted to take, of the slowest stage: beside them the link carries what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List
from math import ceil
from statistics import fmean

import numpy as np

from batchpipe.cost.model import StepWork
from batchpipe.scheduler.policies.temporal import bottleneck_seconds
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_builder import Chunk


class StepTime:
    """`foresee` every step that is planned. Seconds are None where nothing is known of time."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._decode_seconds: deque[float] = deque(maxlen=state.capacity.max_batches)
        self.last_seconds: float | None = None  # of the step planned last
        self.last_num_decodes = 0  # of the last one that decodes

    def foresee(self, chunks: List[Chunk]) -> None:
        if self._state.cost is None:
            return
        queries, contexts, samples = zip(*((c.num_tokens, c.num_context, c.samples) for c in chunks), strict=True)
        work = StepWork.of(np.array(queries, np.int32), np.array(contexts, np.int32), np.array(samples, np.bool_))
        self.last_seconds = bottleneck_seconds(self._state.cost, work)
        # A prompt's last token alone counts as a decode in `work`.
        if num_decodes := sum(c.num_tokens == 1 and bool(c.sequence.generated) for c in chunks):
            self._decode_seconds.append(self.last_seconds)
            self.last_num_decodes = num_decodes

    def seconds_of(self, num_decodes: int, num_prompt_tokens: int) -> float | None:
        """Of a step of average contexts."""
        state = self._state
        if state.cost is None or not state.running:
            return None
        context_tokens = state.context_tokens * num_decodes // len(state.running)
        work = StepWork(num_decodes + num_prompt_tokens, num_decodes, num_decodes, context_tokens, 0)
        return bottleneck_seconds(state.cost, work)

    @property
    def decode_seconds(self) -> float | None:
        """Of a step that decodes: the mean of the last round's."""
        if self._decode_seconds:
            return fmean(self._decode_seconds)
        return self.seconds_of(ceil(len(self._state.running) / self._state.capacity.max_batches), 0)
