"""Which sequences own which KV blocks. Pure bookkeeping: no tensor, no device.

Block numbers are global: every stage keeps its own layers' share of the same block, so one ledger speaks for all.
Sequences whose prompts begin alike own the full blocks of that beginning together (`PrefixCache`), and a block that was
so shared is kept for the next one after its last owner has left, until its room is needed.
Invariant (`check_integrity`): every block is free, or kept, or has the number of owners that it counts.
"""

from __future__ import annotations

from collections import Counter

from batchpipe.kv.prefix_cache import PrefixCache
from batchpipe.types import Int32Array


class BlockManager:
    """Free list and owners of `num_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0 and block_tokens > 0
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.peak_used_blocks = 0
        self._prefixes = PrefixCache(block_tokens)
        # Last in, first out, lowest number first: the pool's pages stay few and warm.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: dict[int, None] = {}  # the one to give away first stands first
        self._owned: dict[int, list[int]] = {}
        self._num_owners = [0] * num_blocks
        self.num_shared = 0  # blocks with several owners

    @property
    def num_free(self) -> int:
        """Blocks that can be given away, the kept ones among them."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

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
        if num_new > self.num_free:
            return None
        blocks = [self._take() for _ in range(num_new)]
        for block in blocks:
            self._num_owners[block] = 1
        self._owned.setdefault(sequence_id, []).extend(blocks)
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used)
        return blocks

    def release(self, sequence_id: int) -> None:
        """Takes every block of the sequence back; a sequence without blocks is fine."""
        # Last block first: of a kept beginning, what stands behind it is given away before it.
        for block in reversed(self._owned.pop(sequence_id, [])):
            self._num_owners[block] -= 1
            self.num_shared -= self._num_owners[block] == 1
            if self._num_owners[block] == 0:
                if self._prefixes.was_shared(block):
                    self._kept[block] = None
                else:
                    self._prefixes.forget(block)
                    self._free.append(block)

    # -- beginnings that several prompts share ---------------------------------------------------------------------

    def new_blocks_for(self, prompt: Int32Array, num_tokens: int) -> int:
        """How many of the free blocks a new sequence would take."""
        found = self._prefixes.find(prompt, num_tokens - 1)
        return self.blocks_for(num_tokens) - sum(self._num_owners[block] > 0 for block in found)

    def share(self, sequence_id: int, prompt: Int32Array, num_tokens: int) -> tuple[int, ...]:
        """Makes a new sequence one more owner of the full blocks that its prompt begins with; these, in table order.

        Of its `num_tokens` tokens the last one is always left to compute.
        """
        assert sequence_id not in self._owned
        found = self._prefixes.find(prompt, num_tokens - 1)
        for block in found:
            self._num_owners[block] += 1
            self.num_shared += self._num_owners[block] == 2
            self._kept.pop(block, None)
            self._prefixes.mark_shared(block)
        if found:
            self._owned[sequence_id] = list(found)
        return found

    def learn(self, sequence_id: int, prompt: Int32Array, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the prompt have KV once the steps made so far are done."""
        self._prefixes.learn(prompt, self._owned[sequence_id], num_tokens)

    def withdraw(self, sequence_id: int) -> None:
        """No other sequence shares this one's blocks from now on."""
        for block in self._owned.get(sequence_id, ()):
            self._prefixes.forget(block)

    def forget_prefixes(self) -> None:
        """Nothing that was computed can be relied on any more."""
        self._prefixes = PrefixCache(self.block_tokens)
        self._free.extend(self._kept)
        self._kept.clear()

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block = next(iter(self._kept))
        del self._kept[block]
        self._prefixes.forget(block)
        return block

    def check_integrity(self) -> None:
        counted = Counter(block for blocks in self._owned.values() for block in blocks)
        assert all(self._num_owners[block] == counted[block] for block in range(self.num_blocks)), "owners miscounted"
        assert self.num_shared == sum(count > 1 for count in counted.values()), "shared blocks miscounted"
        states = list(self._free) + list(self._kept) + list(counted)
        assert len(states) == self.num_blocks, "blocks were lost or made"
        assert len(set(states)) == self.num_blocks, "a block is free and owned"
        assert not any(map(self._prefixes.knows, self._free)), "a free block is offered as a beginning"
        self._prefixes.check_integrity()
