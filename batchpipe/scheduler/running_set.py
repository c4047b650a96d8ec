"""The sequences that hold KV: admission with blocks and a block table, growth, preemption, and release."""

from __future__ import annotations

import logging

from batchpipe.scheduler.offload.swap_scheduler import SwapScheduler
from batchpipe.scheduler.prefix_copy import PrefixCopies
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_builder import BlockTables, PrefillChunk, build_step
from batchpipe.types import Step

logger = logging.getLogger(__name__)


class RunningSet:
    """Keeps `SchedulerState.running`, the ledger and the block tables in line, and the news that the next Step carries.

    swap: where there are two tiers. The ledger and `tables` are then those of the host.
    """

    def __init__(self, state: SchedulerState, swap: SwapScheduler | None) -> None:
        self.state = state
        self.tables = BlockTables(state.max_running)
        self.prefix_copies = PrefixCopies()
        self.started: list[SequenceState] = []
        self.released: list[int] = []
        self.copied_blocks: list[tuple[int, int]] = []
        self.num_reused_tokens = 0
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_corrupt = 0
        self._swap = swap
        self.next_admission = 0

    def admit(self) -> bool:
        """Moves the first waiting sequence to prefilling, with blocks for all its tokens, of which there is room.

        False, with nothing changed, where the device cannot make room for it now.
        """
        state, ledger = self.state, self.state.ledger
        sequence = state.waiting.first
        shared = ledger.share(sequence.sequence_id, sequence.prompt, sequence.num_tokens)
        fresh = ledger.grow(sequence.sequence_id, sequence.num_tokens)
        assert fresh is not None, "admitted without room"
        blocks = [*shared, *fresh]
        if self._swap is not None and not self._swap.admit(sequence, shared, fresh):
            ledger.release(sequence.sequence_id)
            return False
        state.waiting.pop()
        sequence.allocated_tokens = len(blocks) * ledger.block_tokens
        sequence.num_shared_tokens = sequence.num_scheduled = len(shared) * ledger.block_tokens
        sequence.slot = self.tables.take_slot()
        self.tables.append(sequence.slot, 0, blocks)
        sequence.admission = self.next_admission
        self.next_admission += 1
        state.running[sequence.sequence_id] = sequence
        state.context_tokens += sequence.num_tokens
        self.started.append(sequence)
        state.prefilling.append(sequence)
        self._copy_prefix(sequence, blocks)
        sequence.num_reused_tokens = sequence.num_scheduled
        self.num_reused_tokens += sequence.num_reused_tokens
        return True

    def grow(self, sequence: SequenceState) -> bool:
        """Gives the sequence a block for its next token; False, with nothing changed, where none is free."""
        ledger = self.state.ledger
        num_owned = ledger.num_owned(sequence.sequence_id)
        blocks = ledger.grow(sequence.sequence_id, sequence.num_foreseen_tokens)
        if blocks is None:
            return False
        if self._swap is not None:
            self._swap.extend(sequence, blocks)
        self.tables.append(sequence.slot, num_owned, blocks)
        sequence.allocated_tokens += len(blocks) * ledger.block_tokens
        return True

    def park(self, sequence: SequenceState) -> None:
        """The sequence is ready for its next token, unless it was already, or a step in flight has it."""
        if not sequence.is_ready and not sequence.num_in_flight:
            sequence.is_ready = True
            self.state.ready.append(sequence)

    def unpark(self, sequence: SequenceState) -> None:
        if sequence.is_ready:
            sequence.is_ready = False
            self.state.ready.remove(sequence)

    def expect_tokens(self, sampling: list[SequenceState]) -> None:
        """A step that was made samples a token of each. Where steps run ahead, these are ready for the next one."""
        for row, sequence in enumerate(sampling):
            sequence.num_unknown += 1
            sequence.sampled_row = row
            if self.state.capacity.runs_ahead and sequence.runs_ahead:
                sequence.is_ready = True
                self.state.ready.append(sequence)

    def leave(self, sequence: SequenceState) -> None:
        """Takes blocks, slot and sampler state from a sequence that is not in flight."""
        assert sequence.num_in_flight == 0
        state = self.state
        del state.running[sequence.sequence_id]
        state.context_tokens -= sequence.num_tokens
        if self._swap is not None:
            self._swap.device_cache.leave(sequence.sequence_id)
        state.ledger.release(sequence.sequence_id)
        self.tables.release_slot(sequence.slot)
        self.prefix_copies.forget(sequence, state.running.values())
        self.unpark(sequence)
        if sequence in state.prefilling:
            state.prefilling.remove(sequence)
        if sequence in self.started:
            self.started.remove(sequence)
        else:
            self.released.append(sequence.sequence_id)

    def preempt(self, sequence: SequenceState) -> None:
        """The sequence loses its KV, keeps what it generated, and waits first in line."""
        self.num_preemptions += 1
        self.num_recomputed_tokens += sequence.num_scheduled
        self.leave(sequence)
        sequence.num_scheduled = 0
        self.state.waiting.put_back(sequence)

    def find_corrupt(self, sequence: SequenceState, found: str, first_admission: int) -> None:
        """A step computed with KV that is not what was written. No other sequence shares these blocks any more, and
        those admitted since may have shared, or copied, what the step computed.
        """
        self.num_corrupt += 1
        logger.warning("%s; row %s is computed again", found, sequence.group.request.key.row_id)
        sequence.is_corrupt = True
        for other in list(self.state.running.values()):
            if other.admission >= first_admission and other.num_reused_tokens > 0:
                other.is_corrupt = True
        for other in [other for other in self.state.running.values() if other.is_corrupt]:
            self.state.ledger.withdraw(other.sequence_id)
            self.retract(other)

    def retract(self, sequence: SequenceState) -> None:
        """A sequence with corrupt KV is computed again, once no step has it; until then it gets no further."""
        if sequence in self.state.prefilling:
            self.state.prefilling.remove(sequence)
        if sequence.num_in_flight == 0 and sequence.sequence_id in self.state.running:
            sequence.is_corrupt = False
            self.preempt(sequence)

    def forget_news(self) -> None:
        """For stages that were started anew and know no sequence."""
        self.started, self.released, self.copied_blocks = [], [], []

    def build_step(self, step_id: int, decodes: list[SequenceState], prefills: list[PrefillChunk]) -> Step:
        """The step of these sequences, with the sequences started and released and blocks copied since the last one."""
        step = build_step(
            step_id,
            decodes,
            prefills,
            self.tables,
            self.state.ledger.block_tokens,
            self.started,
            self.released,
            self.copied_blocks,
        )
        if self._swap is not None:
            step = self._swap.with_transfers(step)
        if complete := [chunk.sequence for chunk in prefills if chunk.samples]:
            self.prefix_copies.learn(complete[-1])
        self.forget_news()
        return step

    def _copy_prefix(self, sequence: SequenceState, blocks: list[int]) -> None:
        """KV of the tokens that it has in common with another prompt beyond whole blocks is copied, not computed."""
        found = self.prefix_copies.take(sequence)
        if found is None:
            return
        donor, num_alike = found
        if donor.is_corrupt:
            return
        if self._swap is not None and not self._swap.lends(donor):
            return
        first = sequence.num_scheduled // self.state.ledger.block_tokens
        last = self.state.ledger.blocks_for(num_alike)
        sources = self.state.ledger.owned(donor.sequence_id)[first:last]
        self.copied_blocks += zip(sources, blocks[first:last], strict=True)
        sequence.num_scheduled = num_alike
