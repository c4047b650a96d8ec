"""Which KV is on the device for the next step, where the host has all of it: what is loaded, streamed, evicted.

The batches that circulate take turns, so whoever ran last is needed last: it is evicted first, which costs nothing, as
its KV is on the host already. Those whose turn comes are loaded while the step before theirs runs, as far as the link
carries (PipeMax, arXiv 2605.02189: prefetch budget, greedy choice, refinement), or their KV passes through the device
layer by layer while they run themselves (Pie, arXiv 2411.09317). Whom neither reaches waits for a later turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List
from itertools import islice

import numpy as np

from batchpipe.kv.residency import Residency
from batchpipe.plan.cost import seconds_without_stalls
from batchpipe.plan.decode_time import DecodeTime
from batchpipe.plan.load_budget import LoadBudget
from batchpipe.plan.offload import Aim, Candidates, batch_capacity_blocks, select
from batchpipe.plan.policy import Policy
from batchpipe.plan.sequence import Sequence
from batchpipe.plan.state import State
from batchpipe.plan.step_builder import Chunk
from batchpipe.types import Int32Array, StepResult, Transfers

# Who is absent is looked for so many batches down the line.
LOOK_AHEAD_BATCHES = 2
# Who waited longer than so many turns of its batch is loaded before all others.
MAX_WAIT_TURNS = 4
# Rounds that get longer by more than this part are still warming up.
STEADY_SHARE = 0.01
LOOK_AHEAD_PROMPTS = 64
UNKNOWN_TIME = DecodeTime(np.zeros(1), 0.0)


class Pager:
    """Tells for each step who can run in it. `begin_step` opens a step's planning, `take_transfers` closes it."""

    def __init__(self, state: State) -> None:
        capacity = state.capacity
        self.residency = Residency(capacity.num_blocks)
        self._state = state
        self._budget = LoadBudget(state.cost, capacity.block_tokens)
        self._loads_batches = capacity.offload in ("batch", "both")
        # Two layers of a block pass at a time: with fewer than four, streaming saves no room.
        self._streams_layers = capacity.offload in ("layer", "both") and capacity.streams_per_block > 1
        self._time = None if state.cost is None else DecodeTime.of(state.cost, capacity.max_batch_sequences)
        self._recent_seconds: deque[float] = deque(maxlen=2 * capacity.max_batches)
        self._step = 0
        self._cold_step = -1
        self._loads: list[tuple[int, int]] = []
        self._streamed: set[int] = set()
        self._units: list[int] = []
        self._needed: set[int] = set()  # by the step that is being planned: they stay on the device

    # -- a step's planning -----------------------------------------------------------------------------------------

    def begin_step(self, step: int, *, idle: bool) -> None:
        """idle: no step is in flight. Else transfers run beside the step before, and keep off its blocks."""
        self._step = step
        self._cold_step = step - 1 if idle else step - 2
        self._needed.clear()
        self._streamed.clear()
        self._units = []
        self.residency.begin_step(self._cold_step)
        self._state.limit_blocks = self._limit_blocks()

    def draw(self, policy: Policy, num_decodes: int, num_prompt_tokens: int) -> list[Sequence]:
        """Who of the ready sequences decodes, at most so many, beside so many prompt tokens."""
        ready = self._state.ready
        if self._streams_layers:
            self._make_room_to_stream(list(islice(ready, num_decodes)), num_prompt_tokens)
        if all(sequence.sequence_id in self.residency for sequence in ready):
            chosen = policy.draw(self._state, num_decodes)
        else:
            chosen = self._in_line(num_decodes)
        self._needed.update(sequence.sequence_id for sequence in chosen)
        return chosen

    def bring_alone(self, sequence: Sequence) -> bool:
        """Loads one sequence at the cost of all others; nothing is in flight. False where the device is too small."""
        self._needed = {sequence.sequence_id}
        return sequence.sequence_id in self.residency or self._enter(sequence)

    def admit(self, sequence: Sequence, shared: List[int], fresh: List[int]) -> bool:
        """Room for a prompt: the blocks it shares are loaded where they are not there, the others are for it to fill.

        False, with nothing changed but who is on the device, where there is no room.
        """
        if not self._make_room_for(shared, len(fresh)):
            return False
        self._loads += self.residency.enter(sequence.sequence_id, shared, self._step, cold=True)
        self.residency.extend(sequence.sequence_id, fresh)
        self._needed.add(sequence.sequence_id)
        return True

    def keep(self, sequence: Sequence) -> None:
        """The step that is being planned has a chunk of this sequence."""
        self._needed.add(sequence.sequence_id)

    def has_room(self, sequence: Sequence) -> bool:
        """Makes room for a resident's next token; where there is none, it leaves the device instead."""
        num_blocks = self._state.ledger.missing(sequence.sequence_id, sequence.num_tokens)
        if sequence.sequence_id not in self.residency or self._make_room(0, num_blocks):
            return True
        self.residency.leave(sequence.sequence_id)
        return False

    def extend(self, sequence: Sequence, host_blocks: List[int]) -> None:
        """The sequence owns these blocks too; `has_room` made room for them."""
        if sequence.sequence_id in self.residency:
            self.residency.extend(sequence.sequence_id, host_blocks)

    def lends(self, donor: Sequence) -> bool:
        """Whether the step may copy from this sequence's blocks on the device; they stay there then."""
        if donor.sequence_id not in self.residency:
            return False
        self._needed.add(donor.sequence_id)
        return True

    def places_of(self, host_blocks: tuple[int, int]) -> tuple[int, int]:
        """Where two blocks of residents stand on the device."""
        source, target = map(self.residency.place_of, host_blocks)
        assert source is not None and target is not None
        return source, target

    def take_transfers(
        self, chunks: List[Chunk], host_tables: Int32Array, host_copies: List[tuple[int, int]]
    ) -> tuple[Int32Array, Transfers]:
        """The step's device block tables [N, B], and what moves for it."""
        capacity, residency, ledger = self._state.capacity, self.residency, self._state.ledger
        tables = np.zeros_like(host_tables)
        streams: dict[int, int] = {}
        for row, (sequence, num_context, num_tokens, _) in enumerate(chunks):
            width = ledger.blocks_for(num_context + num_tokens)
            if sequence.sequence_id in residency:
                residency.touch(sequence.sequence_id, self._step)
                tables[row, :width] = residency.table(sequence.sequence_id)[:width]
                continue
            assert sequence.sequence_id in self._streamed, "a sequence whose KV is not on the device"
            for column, block in enumerate(ledger.owned(sequence.sequence_id)[:width]):
                place = residency.place_of(block)
                if place is None:
                    place = capacity.num_blocks + streams.setdefault(block, len(streams))
                else:
                    residency.touch_block(block, self._step)
                tables[row, column] = place
        assert len(streams) <= len(self._units) * capacity.streams_per_block
        loads = [(block, place) for block, place in self._loads if residency.place_of(block) == place]
        transfers = Transfers(
            host_tables=host_tables,
            loads=np.array(loads, np.int32).reshape(-1, 2),
            streams=np.array(list(streams), np.int32),
            stream_units=np.array(self._units, np.int32),
            host_copies=np.array(host_copies, np.int32).reshape(-1, 2),
        )
        self._loads, self._units = [], []
        self._streamed.clear()
        return tables, transfers

    def observe(self, transfers: Transfers, result: StepResult) -> None:
        """What a step took, and its loads with it, correct what the link is believed to carry."""
        self._recent_seconds.append(max(seconds_without_stalls(result.stage_seconds, result.link_uses)))
        num_loaded = len(transfers.loads) + len(transfers.streams)
        self._budget.observe(num_loaded, result.stage_seconds, result.link_uses)

    # -- who comes -------------------------------------------------------------------------------------------------

    def _in_line(self, num_decodes: int) -> list[Sequence]:
        """Those whose turn it is, as far as they are on the device or can come; residents in place of the others."""
        line = list(islice(self._state.ready, LOOK_AHEAD_BATCHES * num_decodes))
        due = line[:num_decodes]
        kept = [sequence for sequence in due if sequence.sequence_id in self.residency]
        self._needed.update(sequence.sequence_id for sequence in kept)
        absent = [sequence for sequence in line if sequence.sequence_id not in self.residency]
        chosen = kept + self._load(absent, kept, num_decodes - len(kept))
        waiting = [sequence for sequence in due if sequence.sequence_id not in self.residency]
        chosen += self._stream(waiting[: num_decodes - len(chosen)])
        if len(chosen) < num_decodes:
            others = islice(self._state.ready, num_decodes, None)
            present = (s for s in others if s.sequence_id in self.residency and s.sequence_id not in self._needed)
            chosen += islice(present, num_decodes - len(chosen))
        return chosen

    def _load(self, absent: list[Sequence], kept: list[Sequence], max_sequences: int) -> list[Sequence]:
        """Loads those of the absent that fill the link's budget and make the step take as long as others do."""
        if max_sequences <= 0 or not absent:
            return []
        blocks = np.array([len(self._missing(sequence)) for sequence in absent], np.int64)
        waited = np.array([self._step - sequence.last_step for sequence in absent], np.int64)
        if self._loads_batches:
            limit_blocks = min(self._budget_blocks(), self._cold_room_blocks())
        else:
            # Whoever passes through in layers comes to stay where room is left.
            limit_blocks = self.residency.num_cold - self._units_for(absent)
        max_wait_steps = MAX_WAIT_TURNS * self._state.capacity.max_batches
        oldest = int(np.argmax(waited))
        if waited[oldest] >= max_wait_steps:
            # Else a sequence larger than the budget would never run. The link is late then, for once.
            limit_blocks = max(limit_blocks, int(blocks[oldest]))
        if limit_blocks <= 0:
            return []
        aim = Aim(
            time=self._time or UNKNOWN_TIME,
            limit_blocks=limit_blocks,
            max_sequences=max_sequences,
            num_kept=len(kept),
            kept_context_tokens=sum(sequence.num_tokens for sequence in kept),
            num_other_rows=0,
            target_seconds=self._target_seconds(),
            max_wait_steps=max_wait_steps,
        )
        candidates = Candidates(np.array([sequence.num_tokens for sequence in absent], np.int64), blocks, waited)
        chosen = [absent[index] for index in np.flatnonzero(select(candidates, aim)).tolist()]
        return [sequence for sequence in chosen if self._enter(sequence)]

    def _stream(self, absent: list[Sequence]) -> list[Sequence]:
        """Those of the absent, in line, whose KV can pass through the device while they run."""
        if not absent or not self._streams_layers:
            return []
        limit_blocks = self._budget_blocks() - len(self._loads)
        chosen: list[Sequence] = []
        blocks: set[int] = set()
        num_units = 0
        for sequence in absent:
            more = blocks.union(self._state.ledger.owned(sequence.sequence_id))
            # The next token of each may begin a block.
            num_needed = self._units_of(len(more) + len(chosen) + 1)
            if len(self.residency.missing(list(more))) > limit_blocks or not self._make_room(num_needed, 0):
                break
            blocks, num_units = more, num_needed
            chosen.append(sequence)
        self._units = self.residency.lend(num_units, self._step)
        self._streamed = {sequence.sequence_id for sequence in chosen}
        return chosen

    def _enter(self, sequence: Sequence) -> bool:
        blocks = self._state.ledger.owned(sequence.sequence_id)
        self._needed.add(sequence.sequence_id)
        if not self._make_room_for(blocks, 0):
            return False
        self._loads += self.residency.enter(sequence.sequence_id, blocks, self._step, cold=True)
        return True

    def _missing(self, sequence: Sequence) -> list[int]:
        return self.residency.missing(self._state.ledger.owned(sequence.sequence_id))

    def _budget_blocks(self) -> int:
        return self._budget.blocks()

    def _target_seconds(self) -> float | None:
        """The mean of the last round's steps; None while rounds still get longer (PipeMax's warm-up)."""
        recent, num_batches = list(self._recent_seconds), self._state.capacity.max_batches
        if self._time is None or len(recent) < 2 * num_batches:
            return None
        before, last = sum(recent[:num_batches]), sum(recent[num_batches:])
        return None if last > (1 + STEADY_SHARE) * before else last / num_batches

    def _limit_blocks(self) -> int:
        """KV that can be kept in motion: the capacity law, of at least what the device holds."""
        capacity = self._state.capacity
        num_batches, num_device = capacity.max_batches, capacity.num_blocks
        num_buffers = 1 / capacity.streams_per_block if self._streams_layers else 2.0
        each = batch_capacity_blocks(num_device, self._budget_blocks(), num_batches, num_buffers)
        return max(num_device, min(int(num_batches * each), self._state.ledger.num_blocks))

    # -- who goes --------------------------------------------------------------------------------------------------

    def _make_room_for(self, host_blocks: List[int], num_warm: int) -> bool:
        """Room for those of the blocks that are not on the device: evicting may make them more."""
        num_missing = len(self.residency.missing(host_blocks))
        while self._make_room(num_missing, num_warm):
            if (num_more := len(self.residency.missing(host_blocks))) == num_missing:
                return True
            num_missing = num_more
        return False

    def _make_room(self, num_cold: int, num_warm: int) -> bool:
        """Evicts until so many blocks are free for transfers, and so many more for the step to write."""
        residency = self.residency
        lacking_cold = num_cold - residency.num_cold
        lacking = num_cold + num_warm - residency.num_free
        if lacking_cold <= 0 and lacking <= 0:
            return True
        cold, warm = self._victims()
        if lacking_cold > sum(map(residency.num_held, cold)):
            return False
        if lacking > sum(map(residency.num_held, cold + warm)):
            return False
        # Blocks that a victim shares with others stay, so it may take more of them than it seems.
        while residency.num_cold < num_cold and cold:
            residency.leave(cold.pop(0))
        rest = warm + cold
        while residency.num_free < num_cold + num_warm and rest:
            residency.leave(rest.pop(0))
        return residency.num_cold >= num_cold and residency.num_free >= num_cold + num_warm

    def _victims(self) -> tuple[list[int], list[int]]:
        """Whom the step does not need, the latest used first: those whose blocks are cold, and the others."""
        kept = self._needed.union(sequence.sequence_id for sequence in self._state.prefilling)
        cold: list[int] = []
        warm: list[int] = []
        for sequence_id, last_step in self.residency.latest_first():
            if sequence_id not in kept:
                (cold if last_step <= self._cold_step else warm).append(sequence_id)
        return cold, warm

    def _cold_room_blocks(self) -> int:
        cold, _ = self._victims()
        return self.residency.num_cold + sum(map(self.residency.num_held, cold))

    def _make_room_to_stream(self, due: list[Sequence], num_prompt_tokens: int) -> None:
        """Residents make room for prompts, for growth, and for those that pass through, and pass through themselves."""
        ledger, waiting = self._state.ledger, self._state.waiting
        num_warm = sum(ledger.missing(sequence.sequence_id, sequence.num_tokens) for sequence in due)
        num_spare = self._state.limit_blocks - ledger.num_used
        for sequence in islice(waiting, LOOK_AHEAD_PROMPTS):
            num_prompt_tokens -= sequence.num_tokens
            num_blocks = ledger.new_blocks_for(sequence.prompt, sequence.num_tokens)
            if num_prompt_tokens < 0 or num_blocks > num_spare:
                break
            num_spare -= num_blocks
            num_warm += num_blocks
        num_units = self._units_for(due)
        while self._make_room(num_units, num_warm) and (num_more := self._units_for(due)) > num_units:
            num_units = num_more

    def _units_for(self, sequences: list[Sequence]) -> int:
        """Device blocks that the absent ones of these would pass through, as far as the link carries them."""
        absent = [sequence for sequence in sequences if sequence.sequence_id not in self.residency]
        blocks = {block for sequence in absent for block in self._state.ledger.owned(sequence.sequence_id)}
        return self._units_of(min(len(blocks) + len(absent), self._budget_blocks()))

    def _units_of(self, num_streamed: int) -> int:
        return -(-num_streamed // self._state.capacity.streams_per_block)

    def check_integrity(self) -> None:
        self.residency.check_integrity()
        ledger = self._state.ledger
        for sequence_id in self._state.running:
            if sequence_id in self.residency:
                places = [self.residency.place_of(block) for block in ledger.owned(sequence_id)]
                assert places == self.residency.table(sequence_id), "the device has other blocks than the host"
