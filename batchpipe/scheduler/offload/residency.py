"""Whose KV stands on the device while batches circulate; the host has a copy of all of it.

Rooms are in blocks, and a sequence's are those that it needs with its next token. `check` is what must hold whenever
a step has been decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from batchpipe.scheduler.offload.decode_time import IntArray
from batchpipe.scheduler.offload.selection import evictions

NOBODY: IntArray = np.zeros(0, dtype=np.int64)


class Window(StrEnum):
    """When a step's loads come: whole, while the step before it runs; or in groups of layers, while it runs itself."""

    BATCH = "batch"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Room for KV in blocks, the same on every stage, and what the link is believed to carry into the device."""

    device_blocks: int
    host_blocks: int
    block_tokens: int
    block_bytes: int  # of one stage
    load_bytes_per_second: float


class Residency:
    """Of N sequences by number. reserved_blocks: of the device, for KV on its way that no sequence owns yet."""

    def __init__(
        self, num_sequences: int, tiers: Tiers, num_batches: int, window: Window, reserved_blocks: int
    ) -> None:
        self.tiers, self.window, self.num_batches = tiers, window, num_batches
        self.room_blocks = tiers.device_blocks - reserved_blocks
        self.live: IntArray = NOBODY  # have their prompt's KV, and have not ended
        self.context_tokens = np.zeros(num_sequences, dtype=np.int64)
        self.on_device = np.zeros(num_sequences, dtype=np.bool_)
        self.batch = np.full(num_sequences, -1)  # of those on the device

    def blocks(self, sequences: IntArray) -> IntArray:
        return self.blocks_of(self.context_tokens[sequences] + 1)

    def blocks_of(self, tokens: IntArray | int) -> IntArray:
        return -(-np.asarray(tokens) // self.tiers.block_tokens)

    @property
    def live_blocks(self) -> int:
        return int(self.blocks(self.live).sum())

    @property
    def residents(self) -> IntArray:
        return self.live[self.on_device[self.live]]

    def make_room(self, index: int, wanted_blocks: int, buffer_blocks: int) -> int:
        """Before step `index`: releases what must leave; the blocks that the step's loads may take.

        wanted_blocks: loads that would be of use. buffer_blocks: what loads by layers pass through.
        """
        residents = self.residents
        blocks = self.blocks(residents)
        free = self.room_blocks - int(blocks.sum())
        turns_away = (self.batch[residents] - index) % self.num_batches
        if self.window is Window.LAYERS:
            # The batch that runs may lose blocks first: from now on it is loaded as it runs.
            away = np.where(turns_away == 0, self.num_batches, turns_away)
            self._release(residents[evictions(blocks, away, buffer_blocks - free)])
            return self.room_blocks
        # What decodes need beside the loads is due only once step i - 1 is done, so its batch may lose blocks too.
        self._release(residents[evictions(blocks, turns_away, -free)])
        lately = residents[(turns_away == self.num_batches - 2) & self.on_device[residents]]
        # Loads come while step i - 1 runs: of two batches, neither has blocks to give then.
        lately = lately if self.num_batches > 2 else NOBODY
        leaving = evictions(self.blocks(lately), np.zeros_like(lately), wanted_blocks - max(0, free))
        return max(0, free) + self._release(lately[leaving])

    def settle(self, sequences: IntArray, batch: int, buffer_blocks: int) -> None:
        """Keeps those of the sequences on the device, in order, that find room there; they belong to this batch."""
        free = self.room_blocks - buffer_blocks - int(self.blocks(self.residents).sum())
        fitting = sequences[np.cumsum(self.blocks(sequences)) <= free]
        self.on_device[fitting] = True
        self.batch[fitting] = batch

    def begin(self, sequence: int, prompt_tokens: int, buffer_blocks: int) -> None:
        """The sequence's prompt is computed: it joins the batch with the least on the device, if there is room."""
        residents = self.residents
        held = np.bincount(self.batch[residents], self.blocks(residents), self.num_batches)
        self.context_tokens[sequence] = prompt_tokens
        one = np.array([sequence])
        self.live = np.concatenate([self.live, one])
        self.settle(one, int(held.argmin()), buffer_blocks)

    def end(self, sequences: IntArray) -> None:
        self._release(sequences)
        self.live = self.live[~np.isin(self.live, sequences)]

    def check(self) -> None:
        """Both tiers hold what they can hold, and nobody has KV who has ended."""
        residents = np.flatnonzero(self.on_device)
        assert np.isin(residents, self.live).all(), "KV of nobody on the device"
        assert self.blocks(residents).sum() <= self.room_blocks, "more KV than the device holds"
        assert self.live_blocks <= self.tiers.host_blocks, "more KV than the host holds"
        assert ((self.batch >= 0) == self.on_device).all(), "on the device without a batch"

    def _release(self, sequences: IntArray) -> int:
        self.on_device[sequences] = False
        self.batch[sequences] = -1
        return int(self.blocks(sequences).sum())
