"""The temporal schedule: greedy prefill up to forecast memory, then decoding in batches of equal time.

TD-Pipe (arXiv 2506.10470) parts the phases in time, since prefills between decodes leave stages waiting. What is ours:

- admission asks a distribution of lengths for the risk of running out of blocks, not a point estimate for a peak;
- a decode batch stops at the edge of a tile where one more sequence would cost more than it brings;
- batches are selected to take equal time, by number and context (`batch_balance`);
- where a step has room up to a tile's edge, or needs it to keep the pool full, chunks of prompts ride along: the number
  of tokens that keeps prompts and completions in step, so every step takes the same time and no phase has to change.
  A phase of prefills alone comes only at the start and after much memory fell free.

With two tiers a phase of prefills fills the device. What the host holds beyond it is filled by prompts that ride along,
since decodes must run beside them: a link stands idle while a step has no KV to bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import ceil

import numpy as np

from batchpipe.cost.model import StepWork, bottleneck_seconds
from batchpipe.predict.base import Survival
from batchpipe.scheduler.policies.base import FirstInLine, StepShape
from batchpipe.scheduler.policies.batch_balance import balanced_selection
from batchpipe.scheduler.policies.kv_forecast import KvForecast
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState

# A phase of prefills alone begins where the forecast peak is below this part of the device's blocks.
REFILL_BELOW = 0.6
# Sequences held back as a reserve to balance batches with, where several batches are in flight.
BALANCE_SHARE = 0.03
# Prompts ride along a little faster than completions end, so that the pool stays full.
RIDE_SURPLUS = 1.25
# A longer step is worth it while it takes no more than this part longer.
FLAT = 0.02
# A forecast is made anew after this many tokens of every sequence.
REFRESH_TOKENS = 4
_TILES = (128, 64, 32, 16)
_LOOK_AHEAD_REQUESTS = 64
_ENDLESS_TOKENS = 1 << 17


class Temporal(FirstInLine):
    def __init__(self) -> None:
        self._filling = True
        self._age_steps = 0
        self._forecast: KvForecast | None = None
        self._refused: int | None = None  # not asked for again until the forecast falls
        self._prompt_per_output = 0.0
        self._next_look_steps = 0

    def choose(self, state: SchedulerState) -> StepShape:
        self._age_steps += 1
        possible = bool(state.prefilling) or (bool(state.waiting) and self.admits(state, state.waiting.first))
        if state.capacity.max_batches == 1:
            num_decodes = state.decode_share
            return StepShape(num_decodes, state.capacity.max_step_tokens - num_decodes if possible else 0)
        self._filling = possible and self._fills(state)
        if self._filling:
            return StepShape(0, state.capacity.max_step_tokens)
        num_decodes = self._num_decodes(state)
        return StepShape(num_decodes, self._ride_along_tokens(state, num_decodes) if possible else 0)

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        if not state.has_blocks(sequence):
            return False
        forecast = self._current_forecast(state)
        if self._refused == sequence.sequence_id:
            return False
        expected_blocks, risked_blocks = forecast.peak_blocks_with(sequence)
        # Beyond the limit sequences wait for the link; beyond the last tier one of them loses its KV.
        fits = expected_blocks <= state.limit_blocks and risked_blocks <= state.ledger.num_blocks
        if not fits:
            self._refused = sequence.sequence_id
        return fits

    def select(
        self, state: SchedulerState, candidates: Sequence[SequenceState], num_decodes: int, context_tokens: float
    ) -> list[SequenceState]:
        if state.capacity.max_batches == 1:
            return super().select(state, candidates, num_decodes, context_tokens)
        return balanced_selection(candidates, num_decodes, context_tokens)

    def _current_forecast(self, state: SchedulerState) -> KvForecast:
        forecast, running = self._forecast, state.running
        if forecast is None or self._age_steps >= REFRESH_TOKENS * state.capacity.max_batches:
            survival = state.survival or never_ending()
            forecast = KvForecast(survival, state.capacity.block_tokens, running.values())
            self._forecast, self._age_steps, self._refused = forecast, 0, None
            return forecast
        for sequence in reversed(running.values()):
            if sequence.sequence_id in forecast.counted:
                break
            forecast.add(sequence)
        # In a pipeline a step with prompts holds up the other batches, so room that falls free is given away in groups,
        # by the next forecast; a single batch gives it away at once.
        if state.capacity.max_batches == 1 and len(forecast.counted) > len(running):
            self._refused = None
            for sequence_id in forecast.counted - running.keys():
                forecast.remove(sequence_id)
        return forecast

    def _fills(self, state: SchedulerState) -> bool:
        """Whether the step holds prefills alone. The device's own blocks decide, which do not change as a run goes on:
        what the link carries does, with the time of every step.
        """
        peak_blocks = self._current_forecast(state).peak_blocks()
        if not self._filling:
            return peak_blocks < REFILL_BELOW * state.capacity.num_blocks
        return not state.has_two_tiers or peak_blocks < state.capacity.num_blocks

    def _num_decodes(self, state: SchedulerState) -> int:
        """A batch's share of what runs, less the reserve, or fewer where a tile's edge makes them cheaper each."""
        num_shared = len(state.running) - int(BALANCE_SHARE * len(state.running))
        num_decodes = min(ceil(num_shared / state.capacity.max_batches), state.capacity.max_batch_sequences)
        num_decodes = min(num_decodes, len(state.ready))
        cost = state.cost
        if cost is None or num_decodes == 0:
            return num_decodes
        each_tokens = state.context_tokens / len(state.running)
        sizes = {num_decodes, *(num_decodes // tile * tile for tile in _TILES if num_decodes >= 4 * tile)}
        if len(sizes) == 1:
            return num_decodes

        def rate(size: int) -> float:
            return size / bottleneck_seconds(cost, StepWork.decode(size, int(size * each_tokens)))

        return max(sorted(sizes, reverse=True), key=rate)

    def _ride_along_tokens(self, state: SchedulerState, num_decodes: int) -> int:
        room = state.capacity.max_step_tokens - num_decodes
        if num_decodes == 0:
            return room
        wanted = min(room, ceil(RIDE_SURPLUS * self._demand(state) * num_decodes))
        if state.cost is None:
            return wanted
        limit = (1 + FLAT) * bottleneck_seconds(state.cost, _mixed(num_decodes, wanted))
        for tile in _TILES:
            up_to_edge = ceil((num_decodes + wanted) / tile) * tile - num_decodes
            if up_to_edge <= room and bottleneck_seconds(state.cost, _mixed(num_decodes, up_to_edge)) <= limit:
                return up_to_edge
        return wanted

    def _demand(self, state: SchedulerState) -> float:
        """Prompt tokens to compute for every completion token, of the requests that come next."""
        if self._next_look_steps <= 0 and state.waiting:
            requests = [sequence.group.request for sequence in islice(state.waiting, _LOOK_AHEAD_REQUESTS)]
            classes = np.array([request.length_class for request in requests], np.int32)
            limits = np.array([request.sampling.max_tokens for request in requests], np.int32)
            expected = (state.survival or never_ending()).expected_tokens(classes, limits).sum()
            self._prompt_per_output = sum(len(request.prompt_token_ids) for request in requests) / max(1.0, expected)
            self._next_look_steps = _LOOK_AHEAD_REQUESTS
        self._next_look_steps -= 1
        return self._prompt_per_output


def never_ending() -> Survival:
    """Where nothing is predicted every row is taken to use all its max_tokens."""
    return Survival(np.array([0, _ENDLESS_TOKENS], np.int32), np.ones((1, 2)))


def _mixed(num_decodes: int, num_prefill_tokens: int) -> StepWork:
    return StepWork(num_decodes + num_prefill_tokens, num_decodes, num_decodes, 0, 0)
