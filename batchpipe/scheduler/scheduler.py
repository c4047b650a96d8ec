"""The scheduler: from waiting requests to `Step`s, from `StepResult`s to finished requests. Torch-free, deterministic.

Sequences wait, are admitted with blocks for all their tokens, are prefilled in chunks, then draw one token a step.
A sequence may have several prefill chunks in flight, since every stage runs its steps in order; it has at most one
step in flight that draws a token, or two where steps run ahead (`Capacity.runs_ahead`). With two tiers of KV, blocks
are those of the host, and a sequence that the device has no room for keeps its KV there (`SwapScheduler`).

A step is made in three parts: a `Policy` proposes its shape, `_select` picks the ready sequences that decode, and the
`Allocator` commits blocks and chunks. Where the job's policy finds nothing to do and nothing is in flight, another
one makes sure of progress (`MakeProgress`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from batchpipe.cost.model import CostModel
from batchpipe.kv.block_manager import BlockManager
from batchpipe.scheduler.allocator import Allocator
from batchpipe.scheduler.completion import SequenceEnds
from batchpipe.scheduler.intake import Intake
from batchpipe.scheduler.offload.swap_scheduler import SwapScheduler
from batchpipe.scheduler.policies.base import Policy, StepShape
from batchpipe.scheduler.policies.progress import MakeProgress
from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.scheduler.running_set import RunningSet
from batchpipe.scheduler.sequence import SequenceState, StopMatcher
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_builder import PrefillChunk
from batchpipe.types import (
    Capacity,
    FinishedRequest,
    Request,
    Step,
    StepResult,
    Transfers,
)


class InFlight(NamedTuple):
    """What the scheduler must know of a step when its result comes."""

    sequences: list[SequenceState]
    samples: list[bool]  # whether each of them samples a token
    has_decodes: bool
    transfers: Transfers | None
    first_admission: int  # of the sequences that were admitted for this step or later


class Scheduler:
    """`state.survival` may be renewed between any two steps.

    stream_of: (seed, row id, sample) to the number of a random stream. cost: what policies take a step's time from.
    """

    def __init__(
        self,
        capacity: Capacity,
        schedule: str,
        eos_token_ids: frozenset[int],
        stream_of: Callable[[int, str, int], int],
        matcher_of: Callable[[Request], StopMatcher | None],
        cost: CostModel | None = None,
    ) -> None:
        self.capacity = capacity
        self.ledger = BlockManager(capacity.num_host_blocks or capacity.num_blocks, capacity.block_tokens)
        self.state = SchedulerState(capacity, self.ledger, cost=cost)
        self.swap = SwapScheduler(self.state) if capacity.num_host_blocks else None
        self.num_phase_switches = 0  # from steps that prefill to steps that only decode, and back
        self._arrivals = Intake(eos_token_ids, stream_of, matcher_of)
        self._running_set = RunningSet(self.state, self.swap)
        self._ends = SequenceEnds(self._running_set)
        self._allocator = Allocator(self._running_set, self._ends, self.swap)
        self._policy = SCHEDULES[schedule]()
        self._progress = MakeProgress()
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
        capacity = self.capacity
        return self._num_decoding < capacity.max_decodes_in_flight and len(self._in_flight) < capacity.max_in_flight

    @property
    def num_preemptions(self) -> int:
        return self._running_set.num_preemptions

    @property
    def num_recomputed_tokens(self) -> int:
        return self._running_set.num_recomputed_tokens

    @property
    def num_corrupt(self) -> int:
        """Times that a sequence's KV came back from the host changed."""
        return self._running_set.num_corrupt

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that were not computed, since the KV of another prompt with the same beginning served."""
        return self._running_set.num_reused_tokens

    @property
    def num_device_blocks(self) -> int:
        """In use."""
        return self.swap.device_cache.num_used if self.swap else self.ledger.num_used

    @property
    def num_host_blocks(self) -> int:
        return self.ledger.num_used if self.swap else 0

    @property
    def peak_device_blocks(self) -> int:
        return (self.swap.device_cache if self.swap else self.ledger).peak_used_blocks

    @property
    def peak_host_blocks(self) -> int:
        return self.ledger.peak_used_blocks if self.swap else 0

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.state.waiting and not self.state.running

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            for sequence in self._arrivals.sequences_of(request):
                self.state.waiting.append(sequence)

    def take_finished(self) -> list[FinishedRequest]:
        return self._ends.take()

    def next_step(self) -> Step | None:
        """The next step to submit, or None where a result, or more requests, must come first."""
        first_admission = self._running_set.next_admission
        decodes, prefills = self._fill(self._policy)
        while not (decodes or prefills or self._in_flight or self.idle):
            self._ends.fail_what_cannot_fit()
            decodes, prefills = self._fill(self._progress)
        if not decodes and not prefills:
            return None
        self.num_phase_switches += bool(prefills) != self._prefilled_last
        self._prefilled_last = bool(prefills)
        step = self._running_set.build_step(self._next_step_id, decodes, prefills)
        self._next_step_id += 1
        if self.swap is not None:
            self.swap.foresee(step, len(decodes))
        sequences = decodes + [chunk.sequence for chunk in prefills]
        self._in_flight[step.step_id] = InFlight(
            sequences, step.samples.tolist(), bool(decodes), step.transfers, first_admission
        )
        self._num_decoding += bool(decodes)
        sampling = [sequence for sequence, samples in zip(sequences, step.samples, strict=True) if samples]
        self._running_set.expect_tokens(sampling)
        return step

    def record(self, result: StepResult) -> None:
        """Takes a step's tokens in; whatever ends with them leaves by `take_finished`."""
        sequences, samples, has_decodes, transfers, first_admission = self._in_flight.pop(result.step_id)
        self._num_decoding -= has_decodes
        if self.swap is not None and transfers is not None:
            self.swap.observe(transfers, result)
        token_ids: Iterator[int] = iter(result.token_ids.tolist())
        for sequence, is_sampled in zip(sequences, samples, strict=True):
            sequence.num_in_flight -= 1
            sequence.num_unknown -= is_sampled
            token_id = next(token_ids) if is_sampled else None
            if sequence.is_closed:  # this step ran ahead of the sequence's end
                self._running_set.leave(sequence)
                continue
            found = result.corrupt.get(sequence.sequence_id) if result.corrupt else None
            if found:
                self._running_set.find_corrupt(sequence, found, first_admission)
            if found or sequence.is_corrupt:
                self._running_set.retract(sequence)
                continue
            if token_id is None:
                continue
            if result.logprobs and (logprobs := result.logprobs.get(sequence.sequence_id)) is not None:
                sequence.logprobs.append(logprobs)
            self._ends.take_token(sequence, token_id)
        assert next(token_ids, None) is None, "a step's result does not fit its step"

    def requeue_all(self) -> None:
        """Forgets everything in flight and every block: all running sequences wait again, oldest first.

        For a pipeline that was started anew and holds no KV. What was generated stays.
        """
        self._in_flight.clear()
        self._num_decoding = 0
        for sequence in reversed(list(self.state.running.values())):
            sequence.num_in_flight = sequence.num_unknown = 0
            sequence.is_corrupt = False
            if sequence.is_closed:
                self._running_set.leave(sequence)
            else:
                self._running_set.preempt(sequence)
        self.ledger.forget_prefixes()
        self._running_set.forget_news()

    def check_integrity(self) -> None:
        state = self.state
        self.ledger.check_integrity()
        assert self.ledger.num_used == len({block for i in state.running for block in self.ledger.owned(i)})
        for i, sequence in state.running.items():
            assert sequence.allocated_tokens == self.ledger.num_owned(i) * self.ledger.block_tokens
        assert state.context_tokens == sum(sequence.num_tokens for sequence in state.running.values())
        assert len(state.ready) == sum(sequence.is_ready for sequence in state.running.values())
        parked = len(state.ready) + len(state.prefilling)
        assert parked + sum(s.num_in_flight > 0 for s in state.running.values()) >= len(state.running)
        if self.swap is not None:
            self.swap.check_integrity()

    # -- what a step is made of ----------------------------------------------------------------------------------

    def _fill(self, policy: Policy) -> tuple[list[SequenceState], list[PrefillChunk]]:
        """The decodes and the prefills of the next step: the policy proposes a shape, the allocator commits."""
        state = self.state
        self._allocator.begin_step(self._next_step_id)
        if self.swap is not None:
            self.swap.begin_step(self._next_step_id, idle=not self._in_flight)
        shape = policy.choose(state)
        decodes: list[SequenceState] = []
        if shape.num_decodes > 0 and state.ready:
            decodes = self._allocator.decode(self._select(policy, shape))
            if not decodes and shape.is_last_resort:
                decodes = self._allocator.decode_oldest()
        max_prefills = self.capacity.max_batch_sequences - len(decodes)

        def admits(sequence: SequenceState) -> bool:
            return policy.admits(state, sequence)

        return decodes, self._allocator.prefill(shape.num_prefill_tokens, max_prefills, admits)

    def _select(self, policy: Policy, shape: StepShape) -> list[SequenceState]:
        """The ready sequences that decode; what they need may still preempt some of them."""
        state, num_decodes = self.state, shape.num_decodes
        if self.swap is not None:
            return self.swap.select(policy, num_decodes, shape.num_prefill_tokens)
        return policy.select(state, list(state.ready), num_decodes, state.mean_context_tokens * num_decodes)
