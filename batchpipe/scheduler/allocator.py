"""The one place where a step takes something: blocks for its sequences, room on the device, chunks of their tokens.

What a policy proposes is committed here as far as there is room. Where blocks run out the sequence admitted last gives
its own back and is computed again later (preemption by recompute), so the oldest sequence always goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from batchpipe.scheduler.completion import SequenceEnds
from batchpipe.scheduler.offload.swap_scheduler import SwapScheduler
from batchpipe.scheduler.running_set import RunningSet
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.step_builder import PrefillChunk


class Allocator:
    def __init__(self, running_set: RunningSet, ends: SequenceEnds, swap: SwapScheduler | None) -> None:
        self._state = running_set.state
        self._running_set = running_set
        self._ends = ends
        self._swap = swap
        self._step = 0

    def begin_step(self, step: int) -> None:
        """What is scheduled from now on belongs to this step."""
        self._step = step

    def decode(self, selected: Iterable[SequenceState]) -> list[SequenceState]:
        """The selected ready sequences, for a token each, less those that lose their KV to an older one."""
        state, decodes = self._state, list[SequenceState]()
        for sequence in selected:
            has_block = sequence.num_foreseen_tokens <= sequence.allocated_tokens
            if sequence.sequence_id in state.running and (has_block or self._add_block(sequence)):
                self._schedule(sequence, 1)
                sequence.is_ready = False
                decodes.append(sequence)
        state.ready = deque([sequence for sequence in state.ready if sequence.is_ready])
        return decodes

    def decode_oldest(self) -> list[SequenceState]:
        """With nothing in flight the whole device is there for the oldest ready sequence: it runs, or it never can."""
        while self._swap is not None and self._state.ready:
            sequence = self._state.ready[0]
            has_block = sequence.num_tokens <= sequence.allocated_tokens
            if self._swap.bring_alone(sequence) and (has_block or self._add_block(sequence)):
                self._running_set.unpark(sequence)
                self._schedule(sequence, 1)
                return [sequence]
            if sequence.sequence_id in self._state.running:
                self._ends.fail_too_large(sequence)
        return []

    def prefill(
        self, num_tokens: int, max_sequences: int, admits: Callable[[SequenceState], bool]
    ) -> list[PrefillChunk]:
        """Chunks of prompts that come to `num_tokens` tokens at most, of sequences under way and of admitted ones."""
        state, chunks = self._state, list[PrefillChunk]()
        while num_tokens > 0 and len(chunks) < max_sequences:
            if not state.prefilling:
                is_admitted = bool(state.waiting) and admits(state.waiting.first) and self._running_set.admit()
                if not is_admitted:
                    break
            sequence = state.prefilling[0]
            if self._swap is not None:
                self._swap.keep(sequence)
            num_context = sequence.num_scheduled
            num_chunk = min(num_tokens, sequence.num_tokens - num_context)
            self._schedule(sequence, num_chunk)
            is_whole = sequence.num_scheduled == sequence.num_tokens
            chunks.append(PrefillChunk(sequence, num_context, num_chunk, is_whole))
            state.ledger.learn(sequence.sequence_id, sequence.prompt, sequence.num_scheduled)
            num_tokens -= num_chunk
            if is_whole:
                state.prefilling.popleft()
        return chunks

    def _schedule(self, sequence: SequenceState, num_tokens: int) -> None:
        sequence.num_scheduled += num_tokens
        sequence.num_in_flight += 1
        sequence.last_step = self._step

    def _add_block(self, sequence: SequenceState) -> bool:
        """Gives the sequence a block for its next token, by preempting later sequences if need be."""
        if self._swap is not None and not self._swap.has_room(sequence):
            return False
        while not self._running_set.grow(sequence):
            if sequence.num_in_flight:  # it ran ahead; others' blocks are taken once its token is known
                return False
            if len(self._state.running) == 1:
                self._ends.fail_too_large(sequence)
                return False
            victim = next(s for s in reversed(self._state.running.values()) if s.num_in_flight == 0)
            self._running_set.preempt(victim)
            if victim is sequence:
                return False
        return True
