"""PipeMax's schedule as published (arXiv 2605.02189), to be measured against: prefill until host memory is full, then
decode batches that swap their KV in whole, selected by the link's budget and by equal times.

It predicts no lengths: phases follow KV alone. With one tier of KV it prefills whenever a prompt finds room.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from batchpipe.scheduler.offload.selection import PrefetchWindow
from batchpipe.scheduler.offload.two_stage_selection import Candidates, DecodeFit, PrefetchGoal, select_two_stage
from batchpipe.scheduler.policies.base import FirstInLine, StepShape
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState

# Prompts are computed until this part of the host's blocks is taken.
HOST_WATERMARK = 0.9
# A sequence on the host runs after this many of its batch's turns, even if the link is late then.
MAX_WAIT_TURNS = 64
# Rounds of batches still get longer, and the warm-up goes on, where one takes this part longer than the one before.
WARM_UP_GROWTH = 0.01
# The published estimate is a line that is fitted to batches up to this size.
LINE_SEQUENCES = 256


class PipeMax(FirstInLine):
    def __init__(self) -> None:
        self._is_filling = True
        self._fit: DecodeFit | None = None
        self._round_seconds: deque[float] = deque()  # predicted, of the last two rounds' batches

    def choose(self, state: SchedulerState) -> StepShape:
        """Prefill up to the watermark, then decode until all KV that is left fits the device."""
        capacity = state.capacity
        possible = bool(state.prefilling) or (bool(state.waiting) and self.admits(state, state.waiting.first))
        all_fits = state.ledger.num_used <= capacity.num_blocks
        self._is_filling = possible and (self._is_filling or all_fits)
        if self._is_filling:
            return StepShape(0, capacity.max_step_tokens)
        num_decodes = state.decode_share if all_fits else min(len(state.ready), capacity.max_batch_sequences)
        return StepShape(num_decodes, 0)

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        limit_blocks = int(HOST_WATERMARK * state.ledger.num_blocks)
        return state.has_blocks(sequence, limit_blocks=limit_blocks)

    def select_prefetch(self, state: SchedulerState, window: PrefetchWindow) -> list[SequenceState]:
        if state.cost is None:  # nothing is known of time, so no batch can be made to take a certain one
            return super().select_prefetch(state, window)
        if self._fit is None:
            self._fit = DecodeFit.of(state.cost, LINE_SEQUENCES)
        count = len(window.absent)
        candidates = Candidates(
            context_tokens=np.fromiter((s.num_tokens for s in window.absent), np.int64, count),
            blocks=np.fromiter(map(window.num_missing_blocks, window.absent), np.int64, count),
            waited_turns=np.fromiter(map(window.waited_turns, window.absent), np.float64, count),
        )
        limit_blocks = window.limit_blocks
        oldest = int(np.argmax(candidates.waited_turns))
        if candidates.waited_turns[oldest] >= MAX_WAIT_TURNS:
            # A sequence larger than the budget would never run otherwise. The link is late then, for once.
            limit_blocks = max(limit_blocks, int(candidates.blocks[oldest]))
        goal = PrefetchGoal(
            fit=self._fit,
            limit_blocks=limit_blocks,
            max_sequences=window.max_sequences,
            num_resident=len(window.resident) + window.num_prefill_tokens,
            resident_context_tokens=sum(sequence.num_tokens for sequence in window.resident),
            target_seconds=self._target_seconds(window.num_batches),
            max_wait_turns=MAX_WAIT_TURNS,
        )
        chosen = select_two_stage(candidates, goal)
        self._round_seconds.append(float(goal.seconds(int(chosen.sum()), int(candidates.context_tokens[chosen].sum()))))
        return [window.absent[index] for index in np.flatnonzero(chosen).tolist()]

    def _target_seconds(self, num_batches: int) -> float | None:
        """The mean of the last round's batches; None while rounds still get longer (warm-up)."""
        while len(self._round_seconds) > 2 * num_batches:
            self._round_seconds.popleft()
        recent = list(self._round_seconds)
        if len(recent) < 2 * num_batches:
            return None
        before, last = sum(recent[:num_batches]), sum(recent[num_batches:])
        return None if last > (1 + WARM_UP_GROWTH) * before else last / num_batches
