"""TD-Pipe's schedule as its published code has it (arXiv 2506.10470), to be measured against: greedy prefill until a
forecast of memory is full, work stealing between batches, a switch back by comparing intensities.

Its ways are kept even where they are weak: usage is looked at where lengths are powers of two, a row past its
prediction counts for nothing, and the switch back compares a whole model's decode time with a stage's prefill time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np

from batchpipe.cost.model import CostModel, StepWork
from batchpipe.predict.base import FloatArray
from batchpipe.scheduler.policies.base import FirstInLine, StepShape
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState

MIDPOINTS_TOKENS = np.array([5, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
PREFILL_UNTIL = 0.9  # of the blocks, forecast
WATERMARK = 0.02
PEAK_BATCH_TOKENS = 192
_REFERENCE_BATCH = 256


class TdPipe(FirstInLine):
    """refill_below: prefills begin again where less than this part of the blocks is in use; None: by intensities."""

    def __init__(self, refill_below: float | None = None) -> None:
        self._refill_below = refill_below
        self._prefilling = True
        self._num_decode_steps = 0
        self._usage = np.zeros(len(MIDPOINTS_TOKENS))

    def choose(self, state: SchedulerState) -> StepShape:
        num_batches = state.capacity.max_batches
        if not self._prefilling and self._num_decode_steps % num_batches == 0 and state.waiting:
            self._prefilling = self._prefill_pays(state)
            if self._prefilling:
                self._usage = _usages(state.running.values(), state).sum(axis=0)
        if self._prefilling:
            tokens = self._next_prompts(state)
            if tokens:
                return StepShape(0, min(tokens, state.capacity.max_step_tokens))
            self._prefilling = False
        num_running = len(state.running)
        target = num_running // num_batches + (self._num_decode_steps % num_batches < num_running % num_batches)
        if 0 < len(state.ready) - target <= num_batches:
            target = len(state.ready)
        self._num_decode_steps += bool(state.ready)
        return StepShape(min(target, state.capacity.max_batch_sequences), 0)

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        """Prompts are chosen a micro-batch at a time by `choose`; here only the watermark counts."""
        return state.has_blocks(sequence, int(WATERMARK * state.ledger.num_blocks))

    def select(
        self, state: SchedulerState, candidates: Sequence[SequenceState], num_decodes: int, context_tokens: float
    ) -> list[SequenceState]:
        return sorted(candidates, key=lambda sequence: sequence.sequence_id)[:num_decodes]

    def _next_prompts(self, state: SchedulerState) -> int:
        """Tokens of the next prefill micro-batch, 0 where the phase ends; counts its prompts into the usage."""
        if state.prefilling:
            return sum(sequence.num_tokens - sequence.num_scheduled for sequence in state.prefilling)
        if self._usage.max() >= PREFILL_UNTIL * state.ledger.num_blocks:
            return 0
        tokens = longest = num_blocks = 0
        for count, sequence in enumerate(state.waiting, start=1):
            num_blocks += state.ledger.blocks_for(sequence.num_tokens)
            too_many = len(state.running) + count > state.max_running
            if too_many or num_blocks + int(WATERMARK * state.ledger.num_blocks) > state.ledger.num_free:
                break
            self._usage = self._usage + _usages([sequence], state)[0]
            tokens += sequence.num_tokens
            longest = max(longest, sequence.num_tokens)
            if count * longest >= PEAK_BATCH_TOKENS:
                break
        return tokens

    def _prefill_pays(self, state: SchedulerState) -> bool:
        """Spatial intensity below temporal intensity: the paper's switch from decoding to prefilling."""
        if self._refill_below is not None:
            return state.ledger.num_used < self._refill_below * state.ledger.num_blocks
        num_batches = state.capacity.max_batches
        batch = len(state.running) // num_batches
        if batch > PEAK_BATCH_TOKENS:
            return False
        if batch == 0 or state.cost is None:
            return True
        whole_batch = _whole_model_seconds(state.cost, batch)
        spatial = batch / whole_batch / (_REFERENCE_BATCH / _whole_model_seconds(state.cost, _REFERENCE_BATCH))
        nexts = list(islice(state.waiting, state.max_running))
        usages = _usages(nexts, state)
        before = _usages(state.running.values(), state).sum(axis=0) + np.cumsum(usages, axis=0) - usages
        fits = before.max(axis=1) < state.ledger.num_blocks
        taken = nexts if fits.all() else nexts[: int(fits.argmin())]
        if not taken:
            return False
        seconds = [_whole_model_seconds(state.cost, sequence.num_tokens) for sequence in taken]
        longest = max(seconds)
        prefill_seconds = sum(seconds) / num_batches + longest / num_batches * (num_batches - 1)
        decode_seconds = _whole_model_seconds(state.cost, (len(state.running) + len(taken)) // num_batches)
        bubble_seconds = (longest / num_batches - decode_seconds) * (num_batches - 1)
        return spatial < (prefill_seconds - bubble_seconds) / prefill_seconds


def _usages(sequences: Collection[SequenceState], state: SchedulerState) -> FloatArray:
    """[N, M]: blocks of each row at every midpoint that its predicted rest reaches."""
    requests = (sequence.group.request for sequence in sequences)
    predicted = (request.predicted_tokens or request.sampling.max_tokens for request in requests)
    generated = np.fromiter((len(sequence.generated) for sequence in sequences), np.int64, len(sequences))
    rest = np.fromiter(predicted, np.int64, len(sequences)) - generated
    tokens = np.fromiter((sequence.num_tokens for sequence in sequences), np.int64, len(sequences))
    blocks = np.ceil((tokens[:, None] + MIDPOINTS_TOKENS) / state.capacity.block_tokens)
    return np.where(rest[:, None] >= MIDPOINTS_TOKENS, blocks, 0.0)


def _whole_model_seconds(cost: CostModel, num_tokens: int) -> float:
    """The profile's one curve: by tokens alone, for prompts and batches alike."""
    work = StepWork(num_tokens, num_tokens, num_tokens, 0, 0)
    return sum(cost.stage_seconds(stage, work) for stage in range(cost.num_stages))
