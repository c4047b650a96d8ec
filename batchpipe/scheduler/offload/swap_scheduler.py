"""Which KV is on the device for the next step, where the host has all of it: what is loaded, streamed, evicted.

The batches in flight take turns, so the sequences that ran last are needed last: they are evicted first, which costs
nothing, as their KV is on the host already (`Eviction`). A step takes its share of the residents, so that batches are
alike, and absent sequences as the link can bring them (the policy's `select_prefetch`): their KV is loaded while the
step before theirs runs (PipeMax, arXiv 2605.02189), or it passes through the device layer by layer while they run
themselves (Pie, arXiv 2411.09317), which leaves more room to residents. The others wait for a later turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import ceil

import numpy as np

from batchpipe.kv.capacity_law import BATCH_BUFFERS
from batchpipe.kv.layout import STAGED_LAYERS, saves_room
from batchpipe.scheduler.offload.eviction import Eviction
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.scheduler.offload.selection import PrefetchWindow
from batchpipe.scheduler.offload.working_set_limit import WorkingSetLimit
from batchpipe.scheduler.policies.base import Policy
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_time import StepTime
from batchpipe.types import Int32Array, Step, StepResult, Transfers


class SwapScheduler:
    """Tells for each step which sequences can run in it. `begin_step` opens a step's planning, `with_transfers` and
    `foresee` close it.
    """

    def __init__(self, state: SchedulerState) -> None:
        capacity = state.capacity
        self._state = state
        self._eviction = Eviction(state)
        self.device_cache = self._eviction.device_cache
        self._streams_layers = capacity.offload == "layer" and saves_room(capacity.streams_per_block)
        # With one batch nothing runs beside the first layer's streams of its step.
        is_exposed = self._streams_layers and capacity.max_batches == 1
        exposed_share = 1 / (STAGED_LAYERS * capacity.streams_per_block) if is_exposed else 0.0
        self._budget = PrefetchBudget(state.cost, capacity.block_tokens, exposed_share)
        self._step_time = StepTime(state)
        num_buffers = 1 / capacity.streams_per_block if self._streams_layers else BATCH_BUFFERS
        self._limit = WorkingSetLimit(state, self._budget, self._step_time, num_buffers)
        self._step = 0
        self._loads: list[Int32Array] = []  # (host, device block)
        self._streamed: set[int] = set()
        self._staging_blocks: list[int] = []
        self._num_last_staging = 0  # of the last step that streamed
        self._kept_free_blocks = 0
        self._last_late_step = 0

    # -- a step's planning -----------------------------------------------------------------------------------------

    def begin_step(self, step: int, *, idle: bool) -> None:
        """idle: no step is in flight. Else transfers run beside the step before, and keep off its blocks.

        A step that came to nothing may be begun anew.
        """
        self._step = step
        self._streamed.clear()
        if self._staging_blocks:
            self.device_cache.take_back()
            self._staging_blocks = []
        self._eviction.begin_step(step - 1 if idle else step - 2)
        self._state.limit_blocks = self._limit.blocks()

    def select(self, policy: Policy, num_decodes: int, num_prefill_tokens: int) -> list[SequenceState]:
        """At most `num_decodes` of the ready sequences, to decode beside this many tokens of prompts."""
        state = self._state
        self._kept_free_blocks = 0
        admits = num_prefill_tokens > 0 and bool(state.waiting) and policy.admits(state, state.waiting.first)
        num_prefill_tokens = min(num_prefill_tokens, state.pending_prefill_tokens(admits))
        if self._streams_layers and admits:
            # Room for prompts: without it the residents would run in every step, and no other sequence ever came.
            self._kept_free_blocks = state.blocks_of_prompts(num_prefill_tokens)
            self._eviction.make_room(0, self._kept_free_blocks + self._num_last_staging)
        residents = self.device_cache.residents
        resident = [sequence for sequence in state.ready if sequence.sequence_id in residents]
        absent = [sequence for sequence in state.ready if sequence.sequence_id not in residents]
        if absent:
            selected = self._select_with_absent(policy, resident, absent, num_decodes, num_prefill_tokens)
        else:
            selected = policy.select(state, resident, num_decodes, state.mean_context_tokens * num_decodes)
        self._eviction.needed.update([sequence.sequence_id for sequence in selected])
        return selected

    def bring_alone(self, sequence: SequenceState) -> bool:
        """Loads one sequence at the cost of all others; nothing is in flight. False where the device is too small."""
        self.begin_step(self._step, idle=True)
        self.keep(sequence)
        return sequence.sequence_id in self.device_cache or self._enter(sequence)

    def admit(self, sequence: SequenceState, shared: Sequence[int], fresh: Sequence[int]) -> bool:
        """Room for a prompt: the blocks that it shares are loaded where they are absent, the others it will fill.

        False, with nothing changed but evictions, where there is no room.
        """
        if not self._eviction.make_room_for(shared, len(fresh)):
            return False
        self._loads.append(self.device_cache.enter(sequence.sequence_id, shared, self._step))
        self.device_cache.extend(sequence.sequence_id, fresh)
        self._eviction.needed.add(sequence.sequence_id)
        return True

    def keep(self, sequence: SequenceState) -> None:
        """The step that is being planned has a chunk of this sequence."""
        self._eviction.needed.add(sequence.sequence_id)

    def has_room(self, sequence: SequenceState) -> bool:
        """Makes room for a resident's next token; where there is none, it leaves the device instead."""
        num_blocks = self._state.ledger.missing(sequence.sequence_id, sequence.num_tokens)
        if sequence.sequence_id not in self.device_cache or self._eviction.make_room(0, num_blocks):
            return True
        self.device_cache.leave(sequence.sequence_id)
        return False

    def extend(self, sequence: SequenceState, host_blocks: Sequence[int]) -> None:
        """The sequence owns these blocks too; `has_room` made room for them."""
        if sequence.sequence_id in self.device_cache:
            self.device_cache.extend(sequence.sequence_id, host_blocks)

    def lends(self, donor: SequenceState) -> bool:
        """Whether the step may copy from this sequence's blocks on the device; they stay there then."""
        if donor.sequence_id not in self.device_cache:
            return False
        self.keep(donor)
        return True

    def with_transfers(self, step: Step) -> Step:
        """The step with block tables and copies of the device's blocks, where it had those of the host, and with what
        moves for it.
        """
        capacity, cache, host_tables = self._state.capacity, self.device_cache, step.block_tables
        num_blocks = -(-(step.context_lengths + step.query_lengths) // capacity.block_tokens)
        inside = np.arange(host_tables.shape[1]) < num_blocks[:, None]
        tables = np.where(inside, cache.places(host_tables), 0)
        absent = tables < 0
        is_streamed = np.array([sequence_id in self._streamed for sequence_id in step.sequence_ids])
        assert not absent[~is_streamed].any(), "a sequence whose KV is not on the device"
        cache.touch(step.sequence_ids, self._step)
        cache.touch_blocks(host_tables[inside & ~absent & is_streamed[:, None]], self._step)
        staged_blocks = host_tables[absent]
        slots: Int32Array = np.arange(len(staged_blocks), dtype=np.int32)
        if self._state.ledger.num_shared:
            staged_blocks, inverse = np.unique(staged_blocks, return_inverse=True)
            slots = inverse.astype(np.int32)
        assert len(staged_blocks) <= len(self._staging_blocks) * capacity.streams_per_block
        tables[absent] = 0
        staging_tables = np.full(host_tables.shape, -1, np.int32)
        staging_tables[absent] = slots
        copies = cache.places(step.copied_blocks)
        assert (copies >= 0).all(), "a copy of a block that is not on the device"
        cache.touch_blocks(step.copied_blocks[:, 0], self._step)  # their owners may not be part of the step
        loads = np.concatenate([np.zeros((0, 2), np.int32), *self._loads])
        # What became resident and was evicted again, before the step was whole, is not loaded.
        loads = loads[cache.places(loads[:, 0]) == loads[:, 1]]
        transfers = Transfers(
            host_tables=host_tables,
            staging_tables=staging_tables,
            loads=loads,
            staged_blocks=staged_blocks,
            staging_blocks=np.array(self._staging_blocks, np.int32),
            host_copies=step.copied_blocks,
        )
        self._loads, self._staging_blocks = [], []
        self._streamed.clear()
        return replace(step, block_tables=tables, copied_blocks=copies, transfers=transfers)

    def foresee(self, step: Step, num_decodes: int) -> None:
        """The step will be made; `num_decodes` of its sequences have drawn a token before."""
        self._step_time.foresee(step, num_decodes)

    def observe(self, transfers: Transfers, result: StepResult) -> None:
        """What a step took, and its loads with it, corrects what the link is believed to carry."""
        num_loaded = len(transfers.loads) + len(transfers.staged_blocks)
        self._budget.observe(num_loaded, result.stage_seconds, result.link_uses)

    # -- which sequences come --------------------------------------------------------------------------------------

    def _select_with_absent(
        self,
        policy: Policy,
        resident: list[SequenceState],
        absent: list[SequenceState],
        num_decodes: int,
        num_prefill_tokens: int,
    ) -> list[SequenceState]:
        """A batch's share of the residents, and of the absent those that the policy has the link bring."""
        num_batches, num_residents = self._state.capacity.max_batches, len(self.device_cache)
        num_kept = min(num_decodes, ceil(num_residents / num_batches), len(resident))
        self._eviction.needed.update([sequence.sequence_id for sequence in resident[:num_kept]])

        def window(limit_blocks: int) -> PrefetchWindow:
            return PrefetchWindow(
                absent=absent,
                limit_blocks=limit_blocks,
                max_sequences=num_decodes - num_kept,
                num_missing_blocks=self._eviction.num_missing_blocks,
                resident=resident[:num_kept],
                num_prefill_tokens=num_prefill_tokens,
                step=self._step,
                num_batches=num_batches,
                num_steps_in_time=self._step - self._last_late_step,
            )

        if self._streams_layers:
            # A batch is about as large as the last one was: batches change slowly.
            num_expected = max(num_kept, min(num_decodes, self._step_time.last_num_decodes))
            seconds = self._step_time.seconds_of(num_expected, num_prefill_tokens)
            coming = self._stream(self._prefetched(policy, window(self._budget.blocks(seconds))))
        else:
            limit_blocks = self._budget.blocks(self._step_time.last_seconds)
            limit_blocks = min(limit_blocks, self._eviction.max_cold_blocks)
            coming = [s for s in self._prefetched(policy, window(limit_blocks)) if self._enter(s)]
            # The loads of this step and of the one before stand on the device beside every batch's residents.
            num_kept = min(num_kept, max(0, ceil((num_residents - 2 * len(coming)) / num_batches)))
        context_tokens = self._state.mean_context_tokens * (num_kept + len(coming))
        context_tokens -= sum([sequence.num_tokens for sequence in coming])
        resident = [sequence for sequence in resident if sequence.sequence_id in self.device_cache]
        return policy.select(self._state, resident, num_kept, context_tokens) + coming

    def _prefetched(self, policy: Policy, window: PrefetchWindow) -> list[SequenceState]:
        selected = policy.select_prefetch(self._state, window)
        if sum(map(window.num_missing_blocks, selected)) > window.limit_blocks:
            self._last_late_step = self._step
        return selected

    def _stream(self, selected: list[SequenceState]) -> list[SequenceState]:
        """Those of the selected, in order, whose KV finds room to pass through the device beside the step.

        Where room is left, that of the step's prompts apart, some of them are loaded, for the same bytes, and stay.
        """
        eviction, cache = self._eviction, self.device_cache
        selected, counts = list(selected), self._count_streamed(selected)
        while selected and not eviction.make_room(self._num_staging(counts[-1]), self._kept_free_blocks):
            selected.pop()
            counts.pop()
        if not selected:
            return []
        self._staging_blocks = cache.lend(self._num_staging(counts[-1]), self._step)
        self._num_last_staging = len(self._staging_blocks)
        num_spare = min(cache.num_cold, cache.num_free - self._kept_free_blocks)
        for sequence in selected:
            if eviction.num_missing_blocks(sequence) <= num_spare and self._enter(sequence):
                num_spare = min(cache.num_cold, cache.num_free - self._kept_free_blocks)
            else:
                self._streamed.add(sequence.sequence_id)
        return selected

    def _count_streamed(self, selected: Sequence[SequenceState]) -> list[int]:
        """Streamed blocks of the selected up to each of them; the next token of each may begin a block."""
        ledger = self._state.ledger
        if ledger.num_shared == 0:
            block_tokens = ledger.block_tokens
            return list(accumulate([sequence.allocated_tokens // block_tokens + 1 for sequence in selected]))
        counts: list[int] = []
        blocks: set[int] = set()
        for number, sequence in enumerate(selected, start=1):
            blocks.update(ledger.owned(sequence.sequence_id))
            counts.append(len(blocks) + number)
        return counts

    def _num_staging(self, num_streamed_blocks: int) -> int:
        """Blocks of the device that this many host blocks pass through, group of layers by group."""
        return -(-num_streamed_blocks // self._state.capacity.streams_per_block)

    def _enter(self, sequence: SequenceState) -> bool:
        blocks = self._state.ledger.owned(sequence.sequence_id)
        self.keep(sequence)
        if not self._eviction.make_room_for(blocks, 0):
            return False
        self._loads.append(self.device_cache.enter(sequence.sequence_id, blocks, self._step))
        return True

    def check_integrity(self) -> None:
        self.device_cache.check_integrity()
        ledger = self._state.ledger
        for sequence_id in self._state.running:
            if sequence_id in self.device_cache:
                missing = self.device_cache.num_missing(ledger.owned(sequence_id))
                assert missing == 0, "the device lacks blocks of a resident"
