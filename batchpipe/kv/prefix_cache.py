"""Which full blocks hold which beginnings of prompts: a tree whose edges are the tokens of one block."""

from __future__ import annotations

from collections.abc import Sequence

from batchpipe.types import Int32Array

_ROOT = -1


class PrefixCache:
    """A block's place is its parent block and its own tokens, compared whole, so two beginnings are never confused.

    Whoever owns a block owns its parent, and a kept block is given away before its parent is.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._children: dict[int, dict[bytes, int]] = {_ROOT: {}}
        self._places: dict[int, tuple[int, bytes]] = {}
        self._shared: set[int] = set()

    def find(self, prompt: Int32Array, num_tokens: int) -> tuple[int, ...]:
        """The blocks that hold the longest known beginning of at most `num_tokens` tokens of the prompt."""
        found: list[int] = []
        parent = _ROOT
        for number in range(min(num_tokens, len(prompt)) // self._block_tokens):
            block = self._children[parent].get(self._tokens(prompt, number))
            if block is None:
                break
            found.append(block)
            parent = block
        return tuple(found)

    def learn(self, prompt: Int32Array, blocks: Sequence[int], num_tokens: int) -> None:
        """The first `num_tokens` tokens of the prompt stand in `blocks`."""
        parent = _ROOT
        for number in range(min(num_tokens, len(prompt)) // self._block_tokens):
            block = blocks[number]
            if block not in self._places:
                tokens = self._tokens(prompt, number)
                if tokens in self._children[parent]:
                    # Another sequence computed the same at the same time; behind its block nothing of ours can stand.
                    return
                self._children[parent][tokens] = block
                self._children[block] = {}
                self._places[block] = parent, tokens
            parent = block

    def forget(self, block: int) -> None:
        """The block, and what stands behind it, is no beginning any more."""
        if block not in self._places:
            return
        parent, tokens = self._places.pop(block)
        del self._children[parent][tokens]
        self._shared.discard(block)
        for child in list(self._children[block].values()):
            self.forget(child)
        del self._children[block]

    def mark_shared(self, block: int) -> None:
        self._shared.add(block)

    def was_shared(self, block: int) -> bool:
        return block in self._shared

    def knows(self, block: int) -> bool:
        return block in self._places

    def check_integrity(self) -> None:
        assert self._children.keys() == self._places.keys() | {_ROOT}, "a beginning in the air"
        assert all(self._children[parent][tokens] == block for block, (parent, tokens) in self._places.items())
        assert sum(map(len, self._children.values())) == len(self._places)

    def _tokens(self, prompt: Int32Array, number: int) -> bytes:
        return prompt[number * self._block_tokens : (number + 1) * self._block_tokens].tobytes()
