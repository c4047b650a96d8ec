"""Which sequence owns which KV blocks. Pure bookkeeping: no tensor, no device.

Block numbers are global: every stage keeps its own layers' share of the same block, so one ledger speaks for all.
Invariant (`check_integrity`): every block is either free or owned by exactly one sequence.
"""

from __future__ import annotations


class BlockLedger:
    """Free list and owners of `num_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0 and block_tokens > 0
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.peak_used_blocks = 0
        # Last in, first out, lowest number first: the pool's pages stay few and warm.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def num_owned(self, sequence_id: int) -> int:
        return len(self._owned.get(sequence_id, ()))

    def owned(self, sequence_id: int) -> tuple[int, ...]:
        return tuple(self._owned.get(sequence_id, ()))

    def missing(self, sequence_id: int, num_tokens: int) -> int:
        """How many blocks the sequence lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - self.num_owned(sequence_id))

    def grow(self, sequence_id: int, num_tokens: int) -> list[int] | None:
        """Gives the sequence what it lacks for `num_tokens` tokens.

        Returns the new blocks in table order, or None, with nothing changed, where too few are free.
        """
        num_new = self.missing(sequence_id, num_tokens)
        if num_new > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_new)]
        self._owned.setdefault(sequence_id, []).extend(blocks)
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used)
        return blocks

    def release(self, sequence_id: int) -> None:
        """Takes every block of the sequence back; a sequence without blocks is fine."""
        self._free.extend(reversed(self._owned.pop(sequence_id, [])))

    def check_integrity(self) -> None:
        owned = [block for blocks in self._owned.values() for block in blocks]
        assert len(owned) + len(self._free) == self.num_blocks, "blocks were lost or made"
        assert len(set(owned) | set(self._free)) == self.num_blocks, "a block has two owners"
