"""Chunked prefill: decodes first, and chunks of prompts in what is left of a step's tokens."""

from __future__ import annotations

from batchpipe.scheduler.policies.base import Reactive, StepShape
from batchpipe.scheduler.state import SchedulerState


class ChunkedPrefill(Reactive):
    """The schedule `hybrid` (Sarathi-Serve, arXiv 2403.02310, section 4)."""

    def choose(self, state: SchedulerState) -> StepShape:
        num_decodes = state.decode_share
        return StepShape(num_decodes, max(0, state.capacity.max_step_tokens - num_decodes))
