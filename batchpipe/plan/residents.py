"""Who holds KV: admission with blocks and a block table, growth, and giving everything back."""

from __future__ import annotations

from batchpipe.plan.beginnings import Beginnings
from batchpipe.plan.sequence import Sequence
from batchpipe.plan.state import State
from batchpipe.plan.step_builder import BlockTables


class Residents:
    """Keeps `State.running`, the ledger and the block tables in step, and what the next Step must say of them."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.tables = BlockTables(state.max_running)
        self.beginnings = Beginnings()
        self.started: list[Sequence] = []
        self.released: list[int] = []
        self.copied_blocks: list[tuple[int, int]] = []
        self._next_admission = 0

    def admit(self) -> None:
        """Moves the first waiting sequence to prefilling; there is room for all its tokens."""
        state = self.state
        sequence = state.waiting.popleft()
        blocks = state.ledger.grow(sequence.sequence_id, sequence.num_tokens)
        assert blocks is not None, "admitted without room"
        sequence.room_tokens = len(blocks) * state.ledger.block_tokens
        sequence.slot = self.tables.take_slot()
        self.tables.append(sequence.slot, 0, blocks)
        sequence.admission = self._next_admission
        self._next_admission += 1
        state.running[sequence.sequence_id] = sequence
        state.context_tokens += sequence.num_tokens
        self.started.append(sequence)
        state.prefilling.append(sequence)
        self._copy_beginning(sequence, blocks)

    def grow(self, sequence: Sequence) -> bool:
        """Makes sure of a block for the sequence's next token; False, with nothing changed, where none is free."""
        if sequence.num_tokens <= sequence.room_tokens:
            return True
        ledger = self.state.ledger
        num_owned = ledger.num_owned(sequence.sequence_id)
        blocks = ledger.grow(sequence.sequence_id, sequence.num_tokens)
        if blocks is None:
            return False
        self.tables.append(sequence.slot, num_owned, blocks)
        sequence.room_tokens += len(blocks) * ledger.block_tokens
        return True

    def leave(self, sequence: Sequence) -> None:
        """Takes blocks, slot and sampler state from a sequence that is not in flight."""
        assert sequence.num_in_flight == 0
        state = self.state
        del state.running[sequence.sequence_id]
        state.context_tokens -= sequence.num_tokens
        state.ledger.release(sequence.sequence_id)
        self.tables.release_slot(sequence.slot)
        self.beginnings.forget(sequence, state.running.values())
        for queue in (state.ready, state.prefilling):
            if sequence in queue:
                queue.remove(sequence)
        if sequence in self.started:
            self.started.remove(sequence)
        else:
            self.released.append(sequence.sequence_id)

    def take_news(self) -> tuple[list[Sequence], list[int], list[tuple[int, int]]]:
        """Sequences started and released and blocks to copy since the last step."""
        news = self.started, self.released, self.copied_blocks
        self.started, self.released, self.copied_blocks = [], [], []
        return news

    def _copy_beginning(self, sequence: Sequence, blocks: list[int]) -> None:
        found = self.beginnings.take(sequence)
        if found is not None:
            donor, sequence.num_scheduled = found
            ledger = self.state.ledger
            sources = ledger.owned(donor.sequence_id)[: ledger.blocks_for(sequence.num_scheduled)]
            self.copied_blocks += zip(sources, blocks, strict=False)
