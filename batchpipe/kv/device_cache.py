"""Which KV stands on the device, where the host has all of it: blocks of the device that copy blocks of the host.

A sequence is on the device with all its blocks or not at all; a block that several of them share is there once.
Blocks are given away in the order of steps, not of results: every stage runs the same steps in the same order, so what
the last step read may be written by the next one as it computes. Transfers start earlier, beside the step before: they
get blocks that no step since has touched (`begin_step`).
Invariant (`check_integrity`): every device block is free, or cooling, or copies a block of some resident.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np

from batchpipe.types import Int32Array


class DeviceCache:
    """By sequence, in the order of last use. `touch` says that a step uses a sequence's blocks."""

    def __init__(self, num_device_blocks: int, num_host_blocks: int) -> None:
        self.num_device_blocks = num_device_blocks
        self.peak_used_blocks = 0
        self._free = list(range(num_device_blocks - 1, -1, -1))
        self._cooling: deque[tuple[int, int]] = deque()  # (step that used it last, device block)
        self._residents: dict[int, list[int]] = {}  # host blocks in table order; the one used longest ago stands first
        self._last_steps: dict[int, int] = {}
        self._places: dict[int, int] = {}  # host block to device block
        self._places_array = np.full(num_host_blocks, -1, np.int32)  # the same, to look many up at once; -1: none
        self._num_others: dict[int, int] = {}  # by host block that several residents share, how many beside one
        self._left_steps: dict[int, int] = {}  # by host block: the last step of others that used it
        self._lent: list[tuple[int, int]] = []
        self._cold_step = -1  # the last one whose blocks transfers may write to

    # -- looking ---------------------------------------------------------------------------------------------------

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._residents

    def __len__(self) -> int:
        """Sequences on the device."""
        return len(self._residents)

    @property
    def num_used(self) -> int:
        """Blocks that copy KV of residents."""
        return len(self._places)

    @property
    def num_cold(self) -> int:
        """Free blocks that transfers may write to."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Free blocks that the next step may write to as it computes."""
        return len(self._free) + len(self._cooling)

    def num_held(self, sequence_id: int) -> int:
        return len(self._residents[sequence_id])

    def places(self, host_blocks: Int32Array) -> Int32Array:
        """The device blocks that copy these host blocks, of any shape; -1: none does."""
        return self._places_array[host_blocks]

    def place_of(self, host_block: int) -> int | None:
        return self._places.get(host_block)

    def missing(self, host_blocks: Sequence[int]) -> list[int]:
        """Those of the host blocks that have no copy on the device."""
        return [block for block in host_blocks if block not in self._places]

    def latest_first(self) -> Iterator[tuple[int, int]]:
        """(sequence, last step that used it), the latest first: of those that take turns, whose turn is furthest."""
        for sequence_id in reversed(self._residents):
            yield sequence_id, self._last_steps[sequence_id]

    # -- changing --------------------------------------------------------------------------------------------------

    def begin_step(self, last_touched_step: int) -> None:
        """Blocks that only `last_touched_step` and steps before it used are cold from now on; what was lent is back."""
        self._cold_step = last_touched_step
        given_back = [*self._cooling, *self._lent]
        self._cooling.clear()
        self._lent.clear()
        for step, block in given_back:
            self._give_back(step, block)

    def enter(self, sequence_id: int, host_blocks: Sequence[int], step: int) -> list[tuple[int, int]]:
        """Puts a sequence on the device, for `step` at the earliest. Returns (host, device block) of those it lacked.

        Transfers fill them. There are cold blocks for all that `missing` names.
        """
        assert sequence_id not in self._residents
        lacking = self.missing(host_blocks)
        if len(lacking) < len(host_blocks):
            for block in host_blocks:
                if block in self._places:
                    self._num_others[block] = self._num_others.get(block, 0) + 1
        taken = [(block, self._free.pop()) for block in lacking]
        self._place(taken)
        self._residents[sequence_id] = list(host_blocks)
        self._last_steps[sequence_id] = step - 1  # until `touch` says that a step has it
        return taken

    def extend(self, sequence_id: int, host_blocks: Sequence[int]) -> None:
        """New blocks behind those of a resident, for the next step to write to; there is room."""
        assert not any(block in self._places for block in host_blocks)
        # What computing writes takes warm blocks first and leaves the cold ones to transfers.
        self._place(
            [(block, self._cooling.popleft()[1] if self._cooling else self._free.pop()) for block in host_blocks]
        )
        self._residents[sequence_id] += host_blocks

    def touch(self, sequence_id: int, step: int) -> None:
        self._residents[sequence_id] = self._residents.pop(sequence_id)
        self._last_steps[sequence_id] = step

    def touch_block(self, host_block: int, step: int) -> None:
        """A step uses this block of a resident's for another sequence."""
        self._left_steps[host_block] = step

    def leave(self, sequence_id: int) -> None:
        """Takes the sequence from the device; one that is not there is fine."""
        if sequence_id not in self._residents:
            return
        last_step = self._last_steps.pop(sequence_id)
        gone = self._residents.pop(sequence_id)
        if self._num_others:
            gone = [block for block in gone if not self._others_keep(block, last_step)]
        for block in gone:
            left_step = self._left_steps.pop(block, last_step) if self._left_steps else last_step
            self._give_back(max(last_step, left_step), self._places.pop(block))
        self._places_array[gone] = -1

    def _others_keep(self, block: int, last_step: int) -> bool:
        """Whether a block stays when one of its residents leaves."""
        num_others = self._num_others.pop(block, 0)
        if num_others:
            self._left_steps[block] = max(last_step, self._left_steps.get(block, last_step))
        if num_others > 1:
            self._num_others[block] = num_others - 1
        return num_others > 0

    def lend(self, num_blocks: int, step: int) -> list[int]:
        """Cold blocks for this step alone; there is room."""
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_device_blocks - self.num_free)
        self._lent += [(step, block) for block in blocks]
        return blocks

    def take_back(self) -> None:
        """The step that blocks were lent for is not made: they are as cold as they were."""
        self._free += [block for _, block in self._lent]
        self._lent.clear()

    def _give_back(self, last_step: int, block: int) -> None:
        if last_step <= self._cold_step:
            self._free.append(block)
        else:
            self._cooling.append((last_step, block))

    def _place(self, taken: list[tuple[int, int]]) -> None:
        """(host, device block) each."""
        self._places.update(taken)
        for block, place in taken:
            self._places_array[block] = place
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_device_blocks - self.num_free)

    def check_integrity(self) -> None:
        counted = Counter(block for blocks in self._residents.values() for block in blocks)
        others = {block: count - 1 for block, count in counted.items() if count > 1}
        assert others == self._num_others, "residents miscounted"
        assert self._places.keys() == counted.keys(), "KV of nobody on the device"
        states = self._free + [block for _, block in [*self._cooling, *self._lent]] + list(self._places.values())
        assert sorted(states) == list(range(self.num_device_blocks)), "device blocks were lost or given twice"
        assert self._residents.keys() == self._last_steps.keys()
        placed = np.flatnonzero(self._places_array >= 0)
        assert dict(zip(placed.tolist(), self._places_array[placed].tolist(), strict=True)) == self._places
        assert self._left_steps.keys() <= counted.keys()
