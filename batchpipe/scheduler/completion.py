"""How a sequence ends: with a sampled token, or with an error. A row ends with the last of its samples."""

from __future__ import annotations

from batchpipe.scheduler.running_set import RunningSet
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.types import Completion, ErrorCode, FinishedRequest


class SequenceEnds:
    """`take` what is finished since the last time."""

    def __init__(self, running_set: RunningSet) -> None:
        self._running_set = running_set
        self._state = running_set.state
        self._finished: list[FinishedRequest] = []

    def take(self) -> list[FinishedRequest]:
        finished, self._finished = self._finished, []
        return finished

    def take_token(self, sequence: SequenceState, token_id: int) -> None:
        """Takes the token in that a step sampled for a sequence; it ends with it, or is ready for the next step."""
        if token_id < 0:
            self._fail(sequence, "the model's logits are not finite for this row", ErrorCode.INVALID_LOGITS)
            return
        self._state.context_tokens += 1
        end = sequence.accept(token_id)
        if end is None:
            self._running_set.park(sequence)
        else:
            self._leave(sequence)
            self._close(sequence, sequence.completion(*end))

    def fail_too_large(self, sequence: SequenceState) -> None:
        """The next token would need more KV than there is for one sequence alone."""
        num_kv_tokens = self._most_blocks * self._state.ledger.block_tokens
        self._fail(
            sequence,
            f"the row needs KV for {sequence.num_tokens} tokens at once and there is room for {num_kv_tokens}; "
            "raise engine.kv_device_memory or lower sampling.max_tokens",
            ErrorCode.KV_CAPACITY,
        )

    def fail_what_cannot_fit(self) -> None:
        """With nothing in flight and nothing running, a request that does not fit now never will."""
        state = self._state
        while (
            state.waiting
            and not state.running
            and state.ledger.blocks_for(state.waiting.first.num_tokens) > self._most_blocks
        ):
            self.fail_too_large(state.waiting.pop())

    @property
    def _most_blocks(self) -> int:
        return min(self._state.ledger.num_blocks, self._state.capacity.num_blocks)

    def _fail(self, sequence: SequenceState, message: str, code: ErrorCode) -> None:
        if sequence.sequence_id in self._state.running:
            self._leave(sequence)
        self._close(sequence, sequence.completion(None, error=(code, message)))

    def _leave(self, sequence: SequenceState) -> None:
        """At once, or with the step that ran ahead and still writes to its blocks."""
        if sequence.num_in_flight:
            sequence.is_closed = True
            self._running_set.unpark(sequence)
        else:
            self._running_set.leave(sequence)

    def _close(self, sequence: SequenceState, completion: Completion) -> None:
        if (finished := sequence.group.end(sequence.sample_index, completion)) is not None:
            self._finished.append(finished)
