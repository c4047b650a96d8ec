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
from batchpipe.plan.beginnings import Beginnings
from batchpipe.plan.schedules import SCHEDULES, View
from batchpipe.plan.sequence import RequestGroup, Sequence, StopMatcher
from batchpipe.plan.step_builder import BlockTables, Chunk, build_step
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

# Admission leaves this part of the pool free for the decodes that already run, so that it does not cause preemptions.
ADMISSION_RESERVE = 0.05


class Planner:
    def __init__(
        self,
        capacity: Capacity,
        schedule: str,
        eos_token_ids: frozenset[int],
        stream_of: Callable[[int, str, int], int],
        matcher_of: Callable[[SamplingParams], StopMatcher | None],
    ) -> None:
        self.capacity = capacity
        self.ledger = BlockLedger(capacity.num_blocks, capacity.block_tokens)
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.beginnings = Beginnings()
        self.num_phase_switches = 0  # from steps that prefill to steps that only decode, and back
        self._schedule = SCHEDULES[schedule]
        self._eos_token_ids = eos_token_ids
        self._stream_of = stream_of
        self._matcher_of = matcher_of
        self._max_running = capacity.max_batch_sequences * capacity.max_batches
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._ready: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # in order of admission
        self._in_flight: dict[int, tuple[Chunk, ...]] = {}
        self._tables = BlockTables(self._max_running)
        self._copied_blocks: list[tuple[int, int]] = []
        self._started: list[Sequence] = []
        self._released: list[int] = []
        self._finished: list[FinishedRequest] = []
        self._prefilled_last = False
        self._next_sequence_id = 0
        self._next_step_id = 0
        self._next_admission = 0

    # -- what the run asks ---------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps made so far."""
        return self._next_step_id

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            num_samples = request.sampling.n
            group = RequestGroup(request, [None] * num_samples, num_samples)
            for sample_index in range(num_samples):
                self._waiting.append(self._new_sequence(group, sample_index))

    def take_finished(self) -> list[FinishedRequest]:
        finished, self._finished = self._finished, []
        return finished

    def next_step(self) -> Step | None:
        """The next step to submit, or None where a result, or more requests, must come first."""
        shape = self._schedule(self._view())
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
        step = build_step(
            self._next_step_id,
            chunks,
            self._tables,
            self._started,
            self._released,
            self._copied_blocks,
            self.capacity.block_tokens,
        )
        self._next_step_id += 1
        self._started, self._released, self._copied_blocks = [], [], []
        if whole := [chunk.sequence for chunk in prefills if chunk.samples]:
            self.beginnings.learn(whole[-1])
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
        self._started, self._released = [], []
        for sequence in reversed(list(self._running.values())):
            sequence.num_in_flight = 0
            self._preempt(sequence)
        self._released.clear()
        self._ready.clear()
        self._prefilling.clear()

    def check_integrity(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.num_used == sum(self.ledger.num_owned(i) for i in self._running)
        parked = len(self._ready) + len(self._prefilling)
        assert parked + sum(s.num_in_flight > 0 for s in self._running.values()) >= len(self._running)

    # -- what a step is made of ----------------------------------------------------------------------------------

    def _view(self) -> View:
        return View(
            num_ready=len(self._ready),
            num_running=len(self._running),
            prefill_possible=bool(self._prefilling) or (bool(self._waiting) and self._has_room(self._waiting[0])),
            max_batches=self.capacity.max_batches,
            max_step_tokens=self.capacity.max_step_tokens,
            max_batch_sequences=self.capacity.max_batch_sequences,
        )

    def _take_decodes(self, num_decodes: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        while len(chunks) < num_decodes and self._ready:
            sequence = self._ready.popleft()
            if not self._hold(sequence):
                continue
            chunks.append(self._schedule_chunk(sequence, 1))
        return chunks

    def _take_prefills(self, num_tokens: int, num_sequences: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        max_sequences = self.capacity.max_batch_sequences - num_sequences
        while num_tokens > 0 and len(chunks) < max_sequences:
            if not self._prefilling and not self._admit():
                break
            sequence = self._prefilling[0]
            num_chunk = min(num_tokens, sequence.num_tokens - sequence.num_scheduled)
            chunks.append(self._schedule_chunk(sequence, num_chunk))
            num_tokens -= num_chunk
            if sequence.num_scheduled == sequence.num_tokens:
                self._prefilling.popleft()
        return chunks

    def _schedule_chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        context = sequence.num_scheduled
        sequence.num_scheduled += num_tokens
        sequence.num_in_flight += 1
        return Chunk(sequence, context, num_tokens, sequence.num_scheduled == sequence.num_tokens)

    # -- who holds blocks ----------------------------------------------------------------------------------------

    def _has_room(self, sequence: Sequence) -> bool:
        if len(self._running) >= self._max_running:
            return False
        reserve = int(self.capacity.num_blocks * ADMISSION_RESERVE) if self._running else 0
        reserve = min(reserve, len(self._running))
        return self.ledger.blocks_for(sequence.num_tokens) + reserve <= self.ledger.num_free

    def _admit(self) -> bool:
        """Moves the first waiting sequence to prefilling, if there is room for all its tokens."""
        if not self._waiting or not self._has_room(self._waiting[0]):
            return False
        sequence = self._waiting.popleft()
        blocks = self.ledger.grow(sequence.sequence_id, sequence.num_tokens)
        assert blocks is not None, "room was there a moment ago"
        sequence.slot = self._tables.take_slot()
        self._tables.append(sequence.slot, 0, blocks)
        sequence.admission = self._next_admission
        self._next_admission += 1
        self._running[sequence.sequence_id] = sequence
        self._started.append(sequence)
        self._prefilling.append(sequence)
        self._copy_beginning(sequence, blocks)
        return True

    def _copy_beginning(self, sequence: Sequence, blocks: list[int]) -> None:
        found = self.beginnings.take(sequence)
        if found is not None:
            donor, sequence.num_scheduled = found
            sources = self.ledger.owned(donor.sequence_id)[: self.ledger.blocks_for(sequence.num_scheduled)]
            self._copied_blocks += zip(sources, blocks, strict=False)

    def _hold(self, sequence: Sequence) -> bool:
        """Makes sure of a block for the sequence's next token, at the cost of later sequences if need be."""
        while True:
            num_owned = self.ledger.num_owned(sequence.sequence_id)
            blocks = self.ledger.grow(sequence.sequence_id, sequence.num_tokens)
            if blocks is not None:
                if blocks:
                    self._tables.append(sequence.slot, num_owned, blocks)
                return True
            if len(self._running) == 1:
                self._fail(sequence, self._capacity_message(sequence))
                return False
            victim = next(s for s in reversed(self._running.values()) if s.num_in_flight == 0)
            self._preempt(victim)
            if victim is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.num_recomputed_tokens += sequence.num_scheduled
        self._leave(sequence)
        sequence.num_scheduled = 0
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Takes blocks, slot and sampler state from a sequence that is not in flight."""
        assert sequence.num_in_flight == 0
        del self._running[sequence.sequence_id]
        self.ledger.release(sequence.sequence_id)
        self._tables.release_slot(sequence.slot)
        self.beginnings.forget(sequence, self._running.values())
        for queue in (self._ready, self._prefilling):
            if sequence in queue:
                queue.remove(sequence)
        if sequence in self._started:
            self._started.remove(sequence)
        else:
            self._released.append(sequence.sequence_id)

    # -- how a sequence ends -------------------------------------------------------------------------------------

    def _take_token(self, sequence: Sequence, token_id: int) -> None:
        if token_id < 0:
            self._fail(sequence, "the model's logits are not finite for this row", ErrorCode.INVALID_LOGITS)
            return
        sequence.generated.append(token_id)
        sequence.num_tokens += 1
        params = sequence.group.request.sampling
        if (token_id in self._eos_token_ids and not params.ignore_eos) or token_id in params.stop_token_ids:
            self._finish(sequence, FinishReason.STOP)
            return
        text_length = sequence.matcher.feed(token_id) if sequence.matcher is not None else None
        if text_length is not None:
            self._finish(sequence, FinishReason.STOP, text_length)
        elif len(sequence.generated) >= params.max_tokens:
            self._finish(sequence, FinishReason.LENGTH)
        else:
            self._ready.append(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, text_length: int | None = None) -> None:
        self._leave(sequence)
        group = sequence.group
        group.completions[sequence.sample_index] = sequence.completion(reason, text_length)
        self._close(group)

    def _fail(self, sequence: Sequence, message: str, code: ErrorCode = ErrorCode.KV_CAPACITY) -> None:
        if sequence.sequence_id in self._running:
            self._leave(sequence)
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
        while self._waiting and not self._running and not self._has_room(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._fail(sequence, self._capacity_message(sequence))

    def _capacity_message(self, sequence: Sequence) -> str:
        num_kv_tokens = self.capacity.num_blocks * self.capacity.block_tokens
        return (
            f"the row needs KV for {sequence.num_tokens} tokens at once and there is room for {num_kv_tokens}; "
            "raise engine.kv_device_memory or lower sampling.max_tokens"
        )

    def _new_sequence(self, group: RequestGroup, sample_index: int) -> Sequence:
        request = group.request
        sequence = Sequence(
            sequence_id=self._next_sequence_id,
            group=group,
            sample_index=sample_index,
            stream=self._stream_of(request.sampling.seed, request.key.row_id, sample_index),
            matcher=self._matcher_of(request.sampling),
            prompt=request.prompt_token_ids,
            num_tokens=len(request.prompt_token_ids),
        )
        self._next_sequence_id += 1
        return sequence
