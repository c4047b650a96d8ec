"""Which KV is on the device for the next step, where the host has all of it: what is loaded, streamed, evicted.

The batches that circulate take turns, so whoever ran last is needed last: it is evicted first, which costs nothing, as
its KV is on the host already (`EvictionPolicy`). A step takes its share of those who are on the device, so that batches
are alike, and of the others those who waited longest, as many as the link carries: they are loaded while the step
before theirs runs (PipeMax, arXiv 2605.02189), or their KV passes through the device layer by layer while they run
themselves (Pie, arXiv 2411.09317), which leaves more room to residents. Whom neither reaches waits for a later turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from batchpipe.kv.layout import STAGED_LAYERS, saves_room
from batchpipe.scheduler.offload.eviction import EvictionPolicy
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.scheduler.offload.selection import BATCH_BUFFERS
from batchpipe.scheduler.offload.working_set_limit import WorkingSetLimit
from batchpipe.scheduler.policies.base import Policy
from batchpipe.scheduler.policies.batch_balance import balanced_selection
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_builder import Chunk
from batchpipe.scheduler.step_time import StepTime
from batchpipe.types import Int32Array, StepResult, Transfers

# Who waited longer than so many turns of its batch is loaded even where the link is late then.
MAX_WAIT_TURNS = 4
# Of those who wait, so many may be passed over whose KV is more than the budget's rest.
MAX_SKIPS = 8


class SwapScheduler:
    """Tells for each step who can run in it. `begin_step` opens a step's planning, `take_transfers` closes it."""

    def __init__(self, state: SchedulerState) -> None:
        capacity = state.capacity
        self._state = state
        self._room = EvictionPolicy(state)
        self.residency = self._room.residency
        self._streams_layers = capacity.offload in ("layer", "both") and saves_room(capacity.streams_per_block)
        # With one batch nothing runs beside the first layer's streams of its step.
        is_exposed = self._streams_layers and capacity.max_batches == 1
        exposed_share = 1 / (STAGED_LAYERS * capacity.streams_per_block) if is_exposed else 0.0
        self._budget = PrefetchBudget(state.cost, capacity.block_tokens, exposed_share)
        self._forecast = StepTime(state)
        num_buffers = 1 / capacity.streams_per_block if self._streams_layers else BATCH_BUFFERS
        self._limit = WorkingSetLimit(state, self._budget, self._forecast, num_buffers)
        self._step = 0
        self._loads: list[tuple[int, int]] = []
        self._streamed: set[int] = set()
        self._units: list[int] = []
        self._num_last_units = 0  # of the last step that streamed
        self._kept_free_blocks = 0

    # -- a step's planning -----------------------------------------------------------------------------------------

    def begin_step(self, step: int, *, idle: bool) -> None:
        """idle: no step is in flight. Else transfers run beside the step before, and keep off its blocks.

        A step that came to nothing may be begun anew.
        """
        self._step = step
        self._streamed.clear()
        if self._units:
            self.residency.take_back()
            self._units = []
        self._room.begin_step(step - 1 if idle else step - 2)
        self._state.limit_blocks = self._limit.blocks()

    def draw(self, policy: Policy, num_decodes: int, num_prompt_tokens: int) -> list[SequenceState]:
        """Who of the ready sequences decodes, at most so many, beside so many prompt tokens."""
        self._kept_free_blocks = 0
        waiting = self._state.waiting
        if self._streams_layers and num_prompt_tokens > 0 and waiting and policy.admits(self._state, waiting.first):
            # Room for prompts: else whoever is on the device runs in every step, and nobody else ever comes.
            self._kept_free_blocks = self._state.blocks_of_prompts(num_prompt_tokens)
            self._room.make(0, self._kept_free_blocks + self._num_last_units)
        present: list[SequenceState] = []
        absent: list[SequenceState] = []
        for sequence in self._state.ready:
            (present if sequence.sequence_id in self.residency else absent).append(sequence)
        if absent:
            chosen = self._mixed(present, absent, num_decodes, num_prompt_tokens)
        else:
            chosen = policy.draw(self._state, num_decodes)
        self._room.needed.update(sequence.sequence_id for sequence in chosen)
        return chosen

    def bring_alone(self, sequence: SequenceState) -> bool:
        """Loads one sequence at the cost of all others; nothing is in flight. False where the device is too small."""
        self.begin_step(self._step, idle=True)
        self.keep(sequence)
        return sequence.sequence_id in self.residency or self._enter(sequence)

    def admit(self, sequence: SequenceState, shared: Sequence[int], fresh: Sequence[int]) -> bool:
        """Room for a prompt: the blocks it shares are loaded where they are not there, the others are for it to fill.

        False, with nothing changed but who is on the device, where there is no room.
        """
        if not self._room.make_for(shared, len(fresh)):
            return False
        self._loads += self.residency.enter(sequence.sequence_id, shared, self._step)
        self.residency.extend(sequence.sequence_id, fresh)
        self._room.needed.add(sequence.sequence_id)
        return True

    def keep(self, sequence: SequenceState) -> None:
        """The step that is being planned has a chunk of this sequence."""
        self._room.needed.add(sequence.sequence_id)

    def has_room(self, sequence: SequenceState) -> bool:
        """Makes room for a resident's next token; where there is none, it leaves the device instead."""
        num_blocks = self._state.ledger.missing(sequence.sequence_id, sequence.num_tokens)
        if sequence.sequence_id not in self.residency or self._room.make(0, num_blocks):
            return True
        self.residency.leave(sequence.sequence_id)
        return False

    def extend(self, sequence: SequenceState, host_blocks: Sequence[int]) -> None:
        """The sequence owns these blocks too; `has_room` made room for them."""
        if sequence.sequence_id in self.residency:
            self.residency.extend(sequence.sequence_id, host_blocks)

    def lends(self, donor: SequenceState) -> bool:
        """Whether the step may copy from this sequence's blocks on the device; they stay there then."""
        if donor.sequence_id not in self.residency:
            return False
        self._room.needed.add(donor.sequence_id)
        return True

    def places_of(self, host_blocks: tuple[int, int]) -> tuple[int, int]:
        """Where two blocks of residents stand on the device, for the step to copy one to the other."""
        source, target = map(self.residency.place_of, host_blocks)
        self.residency.touch_block(host_blocks[0], self._step)  # its owner may not be part of the step
        assert source is not None and target is not None
        return source, target

    def take_transfers(
        self, chunks: Sequence[Chunk], host_tables: Int32Array, host_copies: Sequence[tuple[int, int]]
    ) -> tuple[Int32Array, Transfers]:
        """The step's device block tables [N, B], and what moves for it."""
        capacity, residency, ledger = self._state.capacity, self.residency, self._state.ledger
        ends = np.array([ledger.blocks_for(chunk.num_context + chunk.num_tokens) for chunk in chunks])
        inside = np.arange(host_tables.shape[1]) < ends[:, None]
        tables = np.where(inside, residency.places(host_tables), 0)
        is_streamed = np.array([chunk.sequence.sequence_id in self._streamed for chunk in chunks])
        for sequence, *_ in chunks:
            if sequence.sequence_id in residency:
                residency.touch(sequence.sequence_id, self._step)
        absent = tables < 0
        assert not absent[~is_streamed].any(), "a sequence whose KV is not on the device"
        staged_blocks, slots = np.unique(host_tables[absent], return_inverse=True)
        tables[absent] = 0
        staging_tables = np.full(host_tables.shape, -1, np.int32)
        staging_tables[absent] = slots
        for block in host_tables[inside & ~absent & is_streamed[:, None]].tolist():
            residency.touch_block(block, self._step)
        assert len(staged_blocks) <= len(self._units) * capacity.streams_per_block
        loads = np.array(self._loads, np.int32).reshape(-1, 2)
        # Who came and left again, before the step was whole, is not loaded.
        loads = loads[residency.places(loads[:, 0]) == loads[:, 1]]
        transfers = Transfers(
            host_tables=host_tables,
            staging_tables=staging_tables,
            loads=loads,
            staged_blocks=staged_blocks,
            staging_blocks=np.array(self._units, np.int32),
            host_copies=np.array(host_copies, np.int32).reshape(-1, 2),
        )
        self._loads, self._units = [], []
        self._streamed.clear()
        self._forecast.foresee(chunks)
        return tables, transfers

    def observe(self, transfers: Transfers, result: StepResult) -> None:
        """What a step took, and its loads with it, correct what the link is believed to carry."""
        num_loaded = len(transfers.loads) + len(transfers.staged_blocks)
        self._budget.observe(num_loaded, result.stage_seconds, result.link_uses)

    # -- who comes -------------------------------------------------------------------------------------------------

    def _mixed(
        self, present: list[SequenceState], absent: list[SequenceState], num_decodes: int, num_prompt_tokens: int
    ) -> list[SequenceState]:
        """A batch's share of those on the device, and of the absent, in line, whom the link can bring."""
        num_batches = self._state.capacity.max_batches
        num_residents = len(self.residency)
        num_kept = min(num_decodes, ceil(num_residents / num_batches), len(present))
        self._room.needed.update(sequence.sequence_id for sequence in present[:num_kept])
        if self._streams_layers:
            # A batch is as large as the last one was, near enough: batches change slowly.
            num_expected = max(num_kept, min(num_decodes, self._forecast.last_num_decodes))
            coming = self._stream(
                absent, num_decodes - num_kept, self._forecast.seconds_of(num_expected, num_prompt_tokens)
            )
        else:
            coming = self._load(absent, num_decodes - num_kept)
            # The loads of this step and of the one before stand on the device beside every batch's residents.
            num_kept = min(num_kept, max(0, ceil((num_residents - 2 * len(coming)) / num_batches)))
        each_tokens = self._state.context_tokens / len(self._state.running)
        target_tokens = each_tokens * (num_kept + len(coming)) - sum(sequence.num_tokens for sequence in coming)
        present = [sequence for sequence in present if sequence.sequence_id in self.residency]
        return balanced_selection(present, num_kept, target_tokens) + coming

    def _load(self, absent: list[SequenceState], max_sequences: int) -> list[SequenceState]:
        """Those of the absent, in line, whose blocks the link carries while the step before runs."""
        limit_blocks = min(self._budget.blocks(self._forecast.last_seconds), self._room.most_cold_blocks)
        chosen = self._in_line(absent, max_sequences, limit_blocks)
        return [sequence for sequence in chosen if self._enter(sequence)]

    def _in_line(self, absent: list[SequenceState], max_sequences: int, limit_blocks: int) -> list[SequenceState]:
        """The first of the absent whose missing blocks are no more than the limit together, a few passed over."""
        chosen: list[SequenceState] = []
        num_skipped = num_blocks = 0
        for sequence in absent:
            if len(chosen) >= max_sequences or num_skipped > MAX_SKIPS:
                break
            num_more = len(self._room.missing(sequence))
            waited_turns = (self._step - sequence.last_step) / self._state.capacity.max_batches
            # Else a sequence larger than the budget would never run. The link is late then, for once.
            if num_blocks + num_more <= limit_blocks or (not chosen and waited_turns >= MAX_WAIT_TURNS):
                chosen.append(sequence)
                num_blocks += num_more
            else:
                num_skipped += 1
        return chosen

    def _stream(self, absent: list[SequenceState], max_sequences: int, seconds: float | None) -> list[SequenceState]:
        """Those of the absent, in line, whose KV can pass through the device while a step of so many seconds runs.

        Where room is left, that of the step's prompts apart, some of them are loaded, for the same bytes, and stay.
        """
        ledger, room = self._state.ledger, self._room
        chosen = self._in_line(absent, max_sequences, self._budget.blocks(seconds))
        ends_blocks: list[int] = []  # streamed blocks up to each of the chosen
        blocks: set[int] = set()
        for index, sequence in enumerate(chosen):
            blocks.update(ledger.owned(sequence.sequence_id))
            ends_blocks.append(len(blocks) + index + 1)  # the next token of each may begin a block
        while chosen and not room.make(self._units_of(ends_blocks[len(chosen) - 1]), self._kept_free_blocks):
            chosen.pop()
        if not chosen:
            return []
        self._units = self.residency.lend(self._units_of(ends_blocks[len(chosen) - 1]), self._step)
        self._num_last_units = len(self._units)
        for sequence in chosen:
            num_missing = len(room.missing(sequence))
            has_room = num_missing <= min(self.residency.num_cold, self.residency.num_free - self._kept_free_blocks)
            if not has_room or not self._enter(sequence):
                self._streamed.add(sequence.sequence_id)
        return chosen

    def _units_of(self, num_streamed: int) -> int:
        return -(-num_streamed // self._state.capacity.streams_per_block)

    def _enter(self, sequence: SequenceState) -> bool:
        blocks = self._state.ledger.owned(sequence.sequence_id)
        self._room.needed.add(sequence.sequence_id)
        if not self._room.make_for(blocks, 0):
            return False
        self._loads += self.residency.enter(sequence.sequence_id, blocks, self._step)
        return True

    def check_integrity(self) -> None:
        self.residency.check_integrity()
        ledger = self._state.ledger
        for sequence_id in self._state.running:
            if sequence_id in self.residency:
                assert not self.residency.missing(ledger.owned(sequence_id)), "the device lacks blocks of a resident"
