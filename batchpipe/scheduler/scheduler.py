"""The scheduler: from waiting requests to `Step`s, from `StepResult`s to finished requests. Torch-free, deterministic.

Sequences wait, are admitted with blocks for all their tokens, are prefilled in chunks, then draw one token a step.
A sequence may have several prefill chunks in flight, since every stage runs its steps in order; it has at most one
step in flight that draws a token. With two tiers of KV, blocks are those of the host, and a sequence that the device
has no room for keeps its KV there (`SwapScheduler`). Where blocks run out the sequence admitted last gives its own back
and is computed again later (preemption by recompute), so the oldest sequence always goes on and nothing waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from batchpipe.cost.model import CostModel
from batchpipe.kv.block_manager import BlockManager
from batchpipe.scheduler.completion import SequenceEnds
from batchpipe.scheduler.intake import Intake
from batchpipe.scheduler.offload.swap_scheduler import SwapScheduler
from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.scheduler.running_set import RunningSet
from batchpipe.scheduler.sequence import SequenceState, StopMatcher
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_builder import Chunk
from batchpipe.types import (
    Capacity,
    FinishedRequest,
    Request,
    SamplingParams,
    Step,
    StepResult,
    Transfers,
)


class InFlight(NamedTuple):
    """What the scheduler must know of a step when its result comes."""

    chunks: tuple[Chunk, ...]
    has_decodes: bool
    transfers: Transfers | None
    first_admission: int  # of the sequences that were admitted for this step or later


class Scheduler:
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
        self.ledger = BlockManager(capacity.num_host_blocks or capacity.num_blocks, capacity.block_tokens)
        self.state = SchedulerState(capacity, self.ledger, cost=cost)
        self.pager = SwapScheduler(self.state) if capacity.num_host_blocks else None
        self.num_phase_switches = 0  # from steps that prefill to steps that only decode, and back
        self._arrivals = Intake(eos_token_ids, stream_of, matcher_of)
        self._residents = RunningSet(self.state, self.pager)
        self._endings = SequenceEnds(self._residents)
        self._policy = SCHEDULES[schedule]()
        self._in_flight: dict[int, InFlight] = {}
        self._num_decoding = 0  # steps in flight with decodes
        self._prefilled_last = False
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
    def has_room(self) -> bool:
        """Whether one more step may be in flight, of whatever kind."""
        return self._num_decoding < self.capacity.max_batches and len(self._in_flight) < self.capacity.max_in_flight

    @property
    def num_preemptions(self) -> int:
        return self._residents.num_preemptions

    @property
    def num_recomputed_tokens(self) -> int:
        return self._residents.num_recomputed_tokens

    @property
    def num_corrupt(self) -> int:
        """Times that a sequence's KV came back from the host with another content."""
        return self._residents.num_corrupt

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that were not computed, as another sequence that begins alike had their KV."""
        return self._residents.num_reused_tokens

    @property
    def peak_device_blocks(self) -> int:
        return (self.pager.residency if self.pager else self.ledger).peak_used_blocks

    @property
    def peak_host_blocks(self) -> int:
        return self.ledger.peak_used_blocks if self.pager else 0

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.state.waiting and not self.state.running

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            for sequence in self._arrivals.sequences_of(request):
                self.state.waiting.append(sequence)

    def take_finished(self) -> list[FinishedRequest]:
        return self._endings.take()

    def next_step(self) -> Step | None:
        """The next step to submit, or None where a result, or more requests, must come first."""
        first_admission = self._residents.next_admission
        if self.pager is not None:
            self.pager.begin_step(self._next_step_id, idle=not self._in_flight)
        shape = self._policy.choose(self.state)
        decodes = self._take_decodes(shape.num_decodes, shape.num_prefill_tokens)
        prefills = self._take_prefills(shape.num_prefill_tokens, len(decodes))
        while not (decodes or prefills or self._in_flight or self.idle):  # each time somebody runs, ends or lets go
            self._endings.fail_what_cannot_fit()
            if self.pager is not None:
                self.pager.begin_step(self._next_step_id, idle=True)
            if not self.state.prefilling:  # a prompt that was begun keeps its place on the device until it is done
                decodes = self._take_decodes(self.capacity.max_batch_sequences, 0) or self._take_oldest()
            prefills = [] if decodes else self._take_prefills(self.capacity.max_step_tokens, 0)
        chunks = decodes + prefills
        if not chunks:
            return None
        self.num_phase_switches += bool(prefills) != self._prefilled_last
        self._prefilled_last = bool(prefills)
        step = self._residents.build_step(self._next_step_id, chunks)
        self._next_step_id += 1
        if whole := [chunk.sequence for chunk in prefills if chunk.samples]:
            self._residents.beginnings.learn(whole[-1])
        self._in_flight[step.step_id] = InFlight(tuple(chunks), bool(decodes), step.transfers, first_admission)
        self._num_decoding += bool(decodes)
        return step

    def record(self, result: StepResult) -> None:
        """Takes a step's tokens in; whatever ends with them leaves by `take_finished`."""
        chunks, has_decodes, transfers, first_admission = self._in_flight.pop(result.step_id)
        self._num_decoding -= has_decodes
        if self.pager is not None and transfers is not None:
            self.pager.observe(transfers, result)
        token_ids: list[int] = result.token_ids.tolist()
        position = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_in_flight -= 1
            token_id = token_ids[position] if chunk.samples else None
            position += chunk.samples
            if found := result.corrupt.get(sequence.sequence_id):
                self._residents.find_corrupt(sequence, found, first_admission)
            if found or sequence.distrusted:
                self._residents.retract(sequence)
                continue
            if token_id is None:
                continue
            if result.logprobs and (logprobs := result.logprobs.get(sequence.sequence_id)) is not None:
                sequence.logprobs.append(logprobs)
            self._endings.take_token(sequence, token_id)
        assert position == len(token_ids), "a step's result does not fit its step"

    def requeue_all(self) -> None:
        """Forgets everything in flight and every block: all running sequences wait again, oldest first.

        For a pipeline that was started anew and holds no KV. What was generated stays.
        """
        self._in_flight.clear()
        self._num_decoding = 0
        for sequence in reversed(list(self.state.running.values())):
            sequence.num_in_flight = 0
            sequence.distrusted = False
            self._residents.preempt(sequence)
        self.ledger.forget_prefixes()
        self._residents.forget_news()

    def check_integrity(self) -> None:
        state = self.state
        self.ledger.check_integrity()
        assert self.ledger.num_used == len({block for i in state.running for block in self.ledger.owned(i)})
        for i, sequence in state.running.items():
            assert sequence.room_tokens == self.ledger.num_owned(i) * self.ledger.block_tokens
        assert state.context_tokens == sum(sequence.num_tokens for sequence in state.running.values())
        parked = len(state.ready) + len(state.prefilling)
        assert parked + sum(s.num_in_flight > 0 for s in state.running.values()) >= len(state.running)
        if self.pager is not None:
            self.pager.check_integrity()

    # -- what a step is made of ----------------------------------------------------------------------------------

    def _take_decodes(self, num_decodes: int, num_prompt_tokens: int) -> list[Chunk]:
        """A block for one sequence may cost another its place, even one that was drawn with it."""
        if num_decodes <= 0 or not self.state.ready:
            return []
        if self.pager is None:
            drawn = self._policy.draw(self.state, num_decodes)
        else:
            drawn = self.pager.draw(self._policy, num_decodes, num_prompt_tokens)
        chunks: list[Chunk] = []
        for sequence in drawn:
            if sequence.sequence_id in self.state.running and self._hold(sequence):
                chunks.append(self._schedule_chunk(sequence, 1))
        self.state.ready = deque(sequence for sequence in self.state.ready if sequence.num_in_flight == 0)
        return chunks

    def _take_oldest(self) -> list[Chunk]:
        """With nothing in flight the device is there for one sequence alone: it runs, or it never can."""
        while self.pager is not None and self.state.ready:
            sequence = self.state.ready[0]
            if self.pager.bring_alone(sequence) and self._hold(sequence):
                self.state.ready.popleft()
                return [self._schedule_chunk(sequence, 1)]
            if sequence.sequence_id in self.state.running:
                self._endings.fail_too_large(sequence)
        return []

    def _take_prefills(self, num_tokens: int, num_sequences: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        state = self.state
        max_sequences = self.capacity.max_batch_sequences - num_sequences
        while num_tokens > 0 and len(chunks) < max_sequences:
            if not state.prefilling and not self._admit_next():
                break
            sequence = state.prefilling[0]
            num_chunk = min(num_tokens, sequence.num_tokens - sequence.num_scheduled)
            chunks.append(self._schedule_chunk(sequence, num_chunk))
            self.ledger.learn(sequence.sequence_id, sequence.prompt, sequence.num_scheduled)
            num_tokens -= num_chunk
            if sequence.num_scheduled == sequence.num_tokens:
                state.prefilling.popleft()
        return chunks

    def _admit_next(self) -> bool:
        """With nothing running whatever fits is admitted, so that no policy can wait for ever."""
        state = self.state
        if not state.waiting:
            return False
        sequence = state.waiting.first
        admits = self._policy.admits(state, sequence) if state.running else state.has_blocks(sequence)
        return admits and self._residents.admit()

    def _schedule_chunk(self, sequence: SequenceState, num_tokens: int) -> Chunk:
        context = sequence.num_scheduled
        sequence.num_scheduled += num_tokens
        sequence.num_in_flight += 1
        sequence.last_step = self._next_step_id
        if self.pager is not None:
            self.pager.keep(sequence)
        return Chunk(sequence, context, num_tokens, sequence.num_scheduled == sequence.num_tokens)

    # -- where blocks run out ------------------------------------------------------------------------------------

    def _hold(self, sequence: SequenceState) -> bool:
        """Makes sure of a block for the sequence's next token, at the cost of later sequences if need be."""
        if sequence.num_tokens <= sequence.room_tokens:
            return True
        if self.pager is not None and not self.pager.has_room(sequence):
            return False
        while not self._residents.grow(sequence):
            if len(self.state.running) == 1:
                self._endings.fail_too_large(sequence)
                return False
            victim = next(s for s in reversed(self.state.running.values()) if s.num_in_flight == 0)
            self._residents.preempt(victim)
            if victim is sequence:
                return False
        return True
