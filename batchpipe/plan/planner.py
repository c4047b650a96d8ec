"""The planner: from waiting requests to `Step`s, from `StepResult`s to finished requests. Torch-free, deterministic.

Sequences wait, are admitted with blocks for all their tokens, are prefilled in chunks, then draw one token a step.
A sequence may have several prefill chunks in flight, since every stage runs its steps in order; it has at most one
step in flight that draws a token. Where blocks run out the sequence admitted last gives its blocks back and is computed
again later (preemption by recompute), so the oldest sequence always goes on and nothing waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from batchpipe.kv.ledger import BlockLedger
from batchpipe.plan.cost import CostModel
from batchpipe.plan.residents import Residents
from batchpipe.plan.schedules import SCHEDULES
from batchpipe.plan.sequence import RequestGroup, Sequence, StopMatcher
from batchpipe.plan.state import State
from batchpipe.plan.step_builder import Chunk, build_step
from batchpipe.types import (
    Capacity,
    ErrorCode,
    FinishedRequest,
    FinishReason,
    Request,
    SamplingParams,
    Step,
    StepResult,
)


class Planner:
    """`state.survival` may be renewed at any time between steps; `cost` is what policies take a step's time from."""

    def __init__(
        self,
        capacity: Capacity,
        schedule: str,
        eos_token_ids: frozenset[int],
        stream_of: Callable[[int, str, int], int],
        matcher_of: Callable[[SamplingParams], StopMatcher | None],
        cost: CostModel | None = None,
    ) -> None:
        self.capacity = capacity
        self.ledger = BlockLedger(capacity.num_blocks, capacity.block_tokens)
        self.state = State(capacity, self.ledger, cost=cost)
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_phase_switches = 0  # from steps that prefill to steps that only decode, and back
        self._residents = Residents(self.state)
        self._policy = SCHEDULES[schedule]()
        self._eos_token_ids = eos_token_ids
        self._stream_of = stream_of
        self._matcher_of = matcher_of
        self._in_flight: dict[int, tuple[Chunk, ...]] = {}
        self._finished: list[FinishedRequest] = []
        self._prefilled_last = False
        self._next_sequence_id = 0
        self._next_step_id = 0

    # -- what the run asks ---------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self.state.waiting)

    @property
    def num_running(self) -> int:
        return len(self.state.running)

    @property
    def num_steps(self) -> int:
        """Steps made so far."""
        return self._next_step_id

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_copied_tokens(self) -> int:
        """Prompt tokens whose KV was copied from another sequence that begins alike."""
        return self._residents.beginnings.num_copied_tokens

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.state.waiting and not self.state.running

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            num_samples = request.sampling.n
            group = RequestGroup(request, [None] * num_samples, num_samples)
            for sample_index in range(num_samples):
                self.state.waiting.append(self._new_sequence(group, sample_index))

    def take_finished(self) -> list[FinishedRequest]:
        finished, self._finished = self._finished, []
        return finished

    def next_step(self) -> Step | None:
        """The next step to submit, or None where a result, or more requests, must come first."""
        shape = self._policy.choose(self.state)
        decodes = self._take_decodes(shape.num_decodes)
        prefills = self._take_prefills(shape.num_prefill_tokens, len(decodes))
        if not decodes and not prefills and not self._in_flight:
            self._fail_what_cannot_fit()
            decodes = self._take_decodes(self.capacity.max_batch_sequences)
            prefills = [] if decodes else self._take_prefills(self.capacity.max_step_tokens, 0)
        chunks = decodes + prefills
        if not chunks:
            return None
        self.num_phase_switches += bool(prefills) != self._prefilled_last
        self._prefilled_last = bool(prefills)
        started, released, copied_blocks = self._residents.take_news()
        step = build_step(
            self._next_step_id,
            chunks,
            self._residents.tables,
            started,
            released,
            copied_blocks,
            self.capacity.block_tokens,
        )
        self._next_step_id += 1
        if whole := [chunk.sequence for chunk in prefills if chunk.samples]:
            self._residents.beginnings.learn(whole[-1])
        self._in_flight[step.step_id] = tuple(chunks)
        return step

    def record(self, result: StepResult) -> None:
        """Takes a step's tokens in; whatever ends with them leaves by `take_finished`."""
        chunks = self._in_flight.pop(result.step_id)
        token_ids: list[int] = result.token_ids.tolist()
        position = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_in_flight -= 1
            if not chunk.samples:
                continue
            token_id = token_ids[position]
            position += 1
            if result.logprobs and (logprobs := result.logprobs.get(sequence.sequence_id)) is not None:
                sequence.logprobs.append(logprobs)
            self._take_token(sequence, token_id)
        assert position == len(token_ids), "a step's result does not fit its step"

    def requeue_all(self) -> None:
        """Forgets everything in flight and every block: all running sequences wait again, oldest first.

        For a pipeline that was started anew and holds no KV. What was generated stays.
        """
        self._in_flight.clear()
        for sequence in reversed(list(self.state.running.values())):
            sequence.num_in_flight = 0
            self._preempt(sequence)
        self._residents.take_news()

    def check_integrity(self) -> None:
        state = self.state
        self.ledger.check_integrity()
        assert self.ledger.num_used == sum(self.ledger.num_owned(i) for i in state.running)
        for i, sequence in state.running.items():
            assert sequence.room_tokens == self.ledger.num_owned(i) * self.ledger.block_tokens
        assert state.context_tokens == sum(sequence.num_tokens for sequence in state.running.values())
        parked = len(state.ready) + len(state.prefilling)
        assert parked + sum(s.num_in_flight > 0 for s in state.running.values()) >= len(state.running)

    # -- what a step is made of ----------------------------------------------------------------------------------

    def _take_decodes(self, num_decodes: int) -> list[Chunk]:
        """A block for one sequence may cost another its place, even one that was drawn with it."""
        if num_decodes <= 0 or not self.state.ready:
            return []
        chunks: list[Chunk] = []
        for sequence in self._policy.draw(self.state, num_decodes):
            if sequence.sequence_id in self.state.running and self._hold(sequence):
                chunks.append(self._schedule_chunk(sequence, 1))
        self.state.ready = deque(sequence for sequence in self.state.ready if sequence.num_in_flight == 0)
        return chunks

    def _take_prefills(self, num_tokens: int, num_sequences: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        state = self.state
        max_sequences = self.capacity.max_batch_sequences - num_sequences
        while num_tokens > 0 and len(chunks) < max_sequences:
            if not state.prefilling:
                if not state.waiting or not self._admits(state.waiting[0]):
                    break
                self._residents.admit()
            sequence = state.prefilling[0]
            num_chunk = min(num_tokens, sequence.num_tokens - sequence.num_scheduled)
            chunks.append(self._schedule_chunk(sequence, num_chunk))
            num_tokens -= num_chunk
            if sequence.num_scheduled == sequence.num_tokens:
                state.prefilling.popleft()
        return chunks

    def _admits(self, sequence: Sequence) -> bool:
        """With nothing running whatever fits is admitted, so that no policy can wait for ever."""
        if not self.state.running:
            return self.state.has_blocks(sequence)
        return self._policy.admits(self.state, sequence)

    def _schedule_chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        context = sequence.num_scheduled
        sequence.num_scheduled += num_tokens
        sequence.num_in_flight += 1
        return Chunk(sequence, context, num_tokens, sequence.num_scheduled == sequence.num_tokens)

    # -- where blocks run out ------------------------------------------------------------------------------------

    def _hold(self, sequence: Sequence) -> bool:
        """Makes sure of a block for the sequence's next token, at the cost of later sequences if need be."""
        while not self._residents.grow(sequence):
            if len(self.state.running) == 1:
                self._fail(sequence, self._capacity_message(sequence))
                return False
            victim = next(s for s in reversed(self.state.running.values()) if s.num_in_flight == 0)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.num_recomputed_tokens += sequence.num_scheduled
        self._residents.leave(sequence)
        sequence.num_scheduled = 0
        self.state.waiting.appendleft(sequence)

    # -- how a sequence ends -------------------------------------------------------------------------------------

    def _take_token(self, sequence: Sequence, token_id: int) -> None:
        if token_id < 0:
            self._fail(sequence, "the model's logits are not finite for this row", ErrorCode.INVALID_LOGITS)
            return
        sequence.generated.append(token_id)
        sequence.num_tokens += 1
        self.state.context_tokens += 1
        if token_id in sequence.end_token_ids:
            self._finish(sequence, FinishReason.STOP)
            return
        text_length = sequence.matcher.feed(token_id) if sequence.matcher is not None else None
        if text_length is not None:
            self._finish(sequence, FinishReason.STOP, text_length)
        elif len(sequence.generated) >= sequence.max_tokens:
            self._finish(sequence, FinishReason.LENGTH)
        else:
            self.state.ready.append(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, text_length: int | None = None) -> None:
        self._residents.leave(sequence)
        group = sequence.group
        group.completions[sequence.sample_index] = sequence.completion(reason, text_length)
        self._close(group)

    def _fail(self, sequence: Sequence, message: str, code: ErrorCode = ErrorCode.KV_CAPACITY) -> None:
        if sequence.sequence_id in self.state.running:
            self._residents.leave(sequence)
        group = sequence.group
        group.completions[sequence.sample_index] = sequence.completion(None, error=(code, message))
        self._close(group)

    def _close(self, group: RequestGroup) -> None:
        group.num_open -= 1
        if group.num_open == 0:
            completions = tuple(c for c in group.completions if c is not None)
            assert len(completions) == len(group.completions)
            self._finished.append(FinishedRequest(group.request, completions))

    def _fail_what_cannot_fit(self) -> None:
        """With nothing in flight and nothing running, whoever still waits at the head can never run."""
        state = self.state
        while state.waiting and not state.running and not state.has_blocks(state.waiting[0]):
            sequence = state.waiting.popleft()
            self._fail(sequence, self._capacity_message(sequence))

    def _capacity_message(self, sequence: Sequence) -> str:
        num_kv_tokens = self.capacity.num_blocks * self.capacity.block_tokens
        return (
            f"the row needs KV for {sequence.num_tokens} tokens at once and there is room for {num_kv_tokens}; "
            "raise engine.kv_device_memory or lower sampling.max_tokens"
        )

    def _new_sequence(self, group: RequestGroup, sample_index: int) -> Sequence:
        request = group.request
        eos_token_ids = frozenset[int]() if request.sampling.ignore_eos else self._eos_token_ids
        sequence = Sequence(
            sequence_id=self._next_sequence_id,
            group=group,
            sample_index=sample_index,
            stream=self._stream_of(request.sampling.seed, request.key.row_id, sample_index),
            matcher=self._matcher_of(request.sampling),
            prompt=request.prompt_token_ids,
            num_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            end_token_ids=eos_token_ids.union(request.sampling.stop_token_ids),
            length_class=request.length_class,
        )
        self._next_sequence_id += 1
        return sequence
