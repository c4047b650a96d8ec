"""Which KV stands on the device, where the host has all of it: blocks of the device that copy blocks of the host.

A sequence is resident, with all its blocks, or not at all; a block that several residents share is there once. Device
blocks are reused in the order of steps, not of results: every stage runs the same steps in the same order, so what the
last step read may be written by the next one as it computes. Transfers start earlier, beside the step before: they only
write to cold blocks, which no step since `begin_step`'s has touched.
Invariant (`check_integrity`): every device block is free, or cooling, or lent, or copies a block of some resident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, KeysView, Sequence

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import Int32Array


class DeviceCache:
    """Residents stand in the order of last use. `touch` says that a step uses a resident's blocks."""

    def __init__(self, num_device_blocks: int, num_host_blocks: int) -> None:
        self.num_device_blocks = num_device_blocks
        self.peak_used_blocks = 0
        self._cold = list(range(num_device_blocks - 1, -1, -1))
        self._cooling: list[tuple[int, list[int]]] = []  # (last step that used them, device blocks)
        self._num_cooling = 0
        self._lent: list[int] = []
        self._lent_step = -1
        self._residents: dict[int, list[int]] = {}  # host blocks in table order; the one used longest ago stands first
        self._last_steps: dict[int, int] = {}  # by resident
        self._cold_step = -1
        # By host block: the device block that copies it (-1: none), the residents that own it, and the last step that
        # used it for a sequence other than the residents that own it now (-1: none).
        self._places = np.full(num_host_blocks, -1, np.int32)
        self._num_users = np.zeros(num_host_blocks, np.int32)
        self._other_steps = np.full(num_host_blocks, -1, np.int64)
        self._is_shared = False  # whether a block ever had two users; most jobs share none, and need not look

    # -- looking ---------------------------------------------------------------------------------------------------

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._residents

    def __len__(self) -> int:
        """Residents."""
        return len(self._residents)

    @property
    def residents(self) -> KeysView[int]:
        return self._residents.keys()

    @property
    def num_used(self) -> int:
        """Blocks that copy KV of residents."""
        return self.num_device_blocks - self.num_free - len(self._lent)

    @property
    def num_cold(self) -> int:
        """Free blocks that transfers may write to."""
        return len(self._cold)

    @property
    def num_free(self) -> int:
        """Free blocks that the next step may write to as it computes."""
        return len(self._cold) + self._num_cooling

    def num_held(self, sequence_id: int) -> int:
        return len(self._residents[sequence_id])

    def places(self, host_blocks: Int32Array) -> Int32Array:
        """The device blocks that copy these host blocks, of any shape; -1: none does."""
        return self._places[host_blocks]

    def num_missing(self, host_blocks: Sequence[int]) -> int:
        """How many of the host blocks have no copy on the device."""
        return int(np.count_nonzero(self._places[np.asarray(host_blocks, np.intp)] < 0))

    def latest_first(self) -> Iterator[tuple[int, int]]:
        """(resident, last step that used it), the latest first: of those that take turns, whose turn is furthest."""
        for sequence_id in reversed(self._residents):
            yield sequence_id, self._last_steps[sequence_id]

    # -- changing --------------------------------------------------------------------------------------------------

    def begin_step(self, last_touched_step: int) -> None:
        """Blocks that only `last_touched_step` and steps before it used are cold from now on; what was lent is back."""
        self._cold_step = last_touched_step
        given_back = [*self._cooling, (self._lent_step, self._lent)]
        self._cooling, self._num_cooling, self._lent = [], 0, []
        for step, blocks in given_back:
            self._give_back(step, blocks)

    def enter(self, sequence_id: int, host_blocks: Sequence[int], step: int) -> Int32Array:
        """Makes a sequence resident, for `step` at the earliest.

        Returns the loads that fill the blocks which had no copy, [N, 2]: host block and device block of each. There are
        cold blocks for all that `num_missing` counts.
        """
        assert sequence_id not in self._residents
        blocks = np.asarray(host_blocks, np.int32)
        lacking = blocks[self._places[blocks] < 0]
        self._is_shared |= len(lacking) < len(blocks)
        loads = np.empty((len(lacking), 2), np.int32)
        loads[:, 0], loads[:, 1] = lacking, self._pop_cold(len(lacking))
        self._places[lacking] = loads[:, 1]
        self._num_users[blocks] += 1
        self._residents[sequence_id] = list(host_blocks)
        self._last_steps[sequence_id] = step - 1  # until `touch` says that a step has it
        self._note_peak()
        return loads

    def extend(self, sequence_id: int, host_blocks: Sequence[int]) -> None:
        """New blocks behind those of a resident, for the next step to write to; there is room."""
        for block in host_blocks:
            assert self._places[block] < 0
            # What computing writes takes warm blocks first and leaves the cold ones to transfers.
            self._places[block] = self._pop_warm() if self._num_cooling else self._cold.pop()
            self._num_users[block] = 1
        self._residents[sequence_id] += host_blocks
        self._note_peak()

    def touch(self, sequence_ids: Iterable[int], step: int) -> None:
        """A step uses the blocks of those of the sequences that are resident."""
        residents, last_steps = self._residents, self._last_steps
        for sequence_id in sequence_ids:
            if sequence_id in residents:
                residents[sequence_id] = residents.pop(sequence_id)
                last_steps[sequence_id] = step

    def touch_blocks(self, host_blocks: Int32Array, step: int) -> None:
        """A step uses these blocks of residents for other sequences."""
        if len(host_blocks):
            self._is_shared = True
            self._other_steps[host_blocks] = step

    def leave(self, sequence_id: int) -> None:
        """Evicts a sequence; one that is not resident is fine."""
        if sequence_id not in self._residents:
            return
        last_step = self._last_steps.pop(sequence_id)
        blocks = np.array(self._residents.pop(sequence_id), np.intp)
        self._num_users[blocks] -= 1
        if self._is_shared:
            blocks = self._evictable(blocks, last_step)
        places = self._places[blocks].tolist()
        self._places[blocks] = -1
        self._give_back(last_step, places)

    def _evictable(self, blocks: NDArray[np.intp], last_step: int) -> NDArray[np.intp]:
        """Those of the blocks whose device blocks only this resident used; the others stay, or are given back here."""
        is_kept = self._num_users[blocks] > 0
        kept, gone = blocks[is_kept], blocks[~is_kept]
        self._other_steps[kept] = np.maximum(self._other_steps[kept], last_step)
        other_steps = self._other_steps[gone]
        self._other_steps[gone] = -1
        is_later = other_steps > last_step
        if is_later.any():
            self._give_back(int(other_steps.max()), self._places[gone[is_later]].tolist())
            self._places[gone[is_later]] = -1
        return gone[~is_later]

    def lend(self, num_blocks: int, step: int) -> list[int]:
        """Cold blocks for this step alone; there is room."""
        self._lent, self._lent_step = self._pop_cold(num_blocks), step
        self._note_peak()
        return list(self._lent)

    def take_back(self) -> None:
        """The step that blocks were lent for is not made: they are as cold as they were."""
        self._cold += self._lent
        self._lent = []

    def _pop_cold(self, num_blocks: int) -> list[int]:
        assert num_blocks <= len(self._cold), "more blocks than are cold"
        if num_blocks == 0:
            return []
        taken = self._cold[: -num_blocks - 1 : -1]
        del self._cold[-num_blocks:]
        return taken

    def _pop_warm(self) -> int:
        _, blocks = self._cooling[0]
        block = blocks.pop()
        self._num_cooling -= 1
        if not blocks:
            del self._cooling[0]
        return block

    def _give_back(self, last_step: int, blocks: list[int]) -> None:
        if last_step <= self._cold_step:
            self._cold += blocks
        elif blocks:
            self._cooling.append((last_step, blocks))
            self._num_cooling += len(blocks)

    def _note_peak(self) -> None:
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_device_blocks - self.num_free)

    def check_integrity(self) -> None:
        counted = Counter(block for blocks in self._residents.values() for block in blocks)
        placed = np.flatnonzero(self._places >= 0).tolist()
        assert placed == sorted(counted), "KV of no sequence on the device"
        assert self._num_users[placed].tolist() == [counted[block] for block in placed], "residents miscounted"
        assert not self._num_users[self._places < 0].any() and (self._other_steps[self._places < 0] == -1).all()
        cooling = [block for _, blocks in self._cooling for block in blocks]
        assert len(cooling) == self._num_cooling
        states = [*self._cold, *cooling, *self._lent, *self._places[placed].tolist()]
        assert sorted(states) == list(range(self.num_device_blocks)), "device blocks were lost or given twice"
        assert self._residents.keys() == self._last_steps.keys()
