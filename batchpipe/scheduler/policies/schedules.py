"""The schedules a job can name, and the two simple ones."""

from __future__ import annotations

from collections.abc import Callable

from batchpipe.scheduler.policies.base import Policy, Reactive, StepShape
from batchpipe.scheduler.policies.td_pipe import TdPipe
from batchpipe.scheduler.policies.temporal import Temporal
from batchpipe.scheduler.state import SchedulerState


class Hybrid(Reactive):
    """Decodes first, what is left of the step's tokens for pieces of prompts (Sarathi-Serve's chunked prefill)."""

    def choose(self, state: SchedulerState) -> StepShape:
        num_decodes = state.decode_share
        return StepShape(num_decodes, max(0, state.capacity.max_step_tokens - num_decodes))


class Separate(Reactive):
    """Only prefills while there is room for one, else only decodes (vLLM's first scheduler)."""

    def choose(self, state: SchedulerState) -> StepShape:
        if self.prefill_possible(state):
            return StepShape(0, state.capacity.max_step_tokens)
        return StepShape(state.decode_share, 0)


SCHEDULES: dict[str, Callable[[], Policy]] = {
    "hybrid": Hybrid,
    "separate": Separate,
    "temporal": Temporal,
    "temporal-published": TdPipe,
}
