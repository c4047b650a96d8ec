"""The schedules a job can name, and the two simple ones."""

from __future__ import annotations

from collections.abc import Callable

from batchpipe.plan.policy import Policy, Reactive, StepShape
from batchpipe.plan.published import PublishedTemporal
from batchpipe.plan.state import State
from batchpipe.plan.temporal import Temporal


class Hybrid(Reactive):
    """Decodes first, what is left of the step's tokens for pieces of prompts (Sarathi-Serve's chunked prefill)."""

    def choose(self, state: State) -> StepShape:
        num_decodes = state.decode_share
        return StepShape(num_decodes, max(0, state.capacity.max_step_tokens - num_decodes))


class Separate(Reactive):
    """Only prefills while there is room for one, else only decodes (vLLM's first scheduler)."""

    def choose(self, state: State) -> StepShape:
        if self.prefill_possible(state):
            return StepShape(0, state.capacity.max_step_tokens)
        return StepShape(state.decode_share, 0)


SCHEDULES: dict[str, Callable[[], Policy]] = {
    "hybrid": Hybrid,
    "separate": Separate,
    "temporal": Temporal,
    "temporal-published": PublishedTemporal,
}
