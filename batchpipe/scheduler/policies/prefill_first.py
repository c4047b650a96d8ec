"""Prefill first: steps of prefills alone while a prompt finds room, else steps of decodes alone."""

from __future__ import annotations

from batchpipe.scheduler.policies.base import Reactive, StepShape
from batchpipe.scheduler.state import SchedulerState


class PrefillFirst(Reactive):
    """The schedule `separate`, as vLLM's first scheduler has it (arXiv 2309.06180, section 4.5)."""

    def choose(self, state: SchedulerState) -> StepShape:
        if state.prefilling or (state.waiting and self.admits(state, state.waiting.first)):
            return StepShape(0, state.capacity.max_step_tokens)
        return StepShape(state.decode_share, 0)
