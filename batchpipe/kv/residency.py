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


class Residency:
    """By sequence, in the order of last use. `touch` says that a step uses a sequence's blocks."""

    def __init__(self, num_device_blocks: int) -> None:
        self.num_device_blocks = num_device_blocks
        self.peak_used_blocks = 0
        self._free = list(range(num_device_blocks - 1, -1, -1))
        self._cooling: deque[tuple[int, int]] = deque()  # (step that used it last, device block)
        self._residents: dict[int, list[int]] = {}  # host blocks in table order; the one used longest ago stands first
        self._last_steps: dict[int, int] = {}
        self._places: dict[int, int] = {}  # host block to device block
        self._num_residents: Counter[int] = Counter()  # by host block
        self._left_steps: dict[int, int] = {}  # by host block: the last step of others that used it
        self._lent: list[tuple[int, int]] = []
        self._cold_step = -1  # the last one whose blocks transfers may write to

    # -- looking ---------------------------------------------------------------------------------------------------

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._residents

    @property
    def num_used(self) -> int:
        return self.num_device_blocks - len(self._free) - len(self._cooling)

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

    def table(self, sequence_id: int) -> list[int]:
        """The device blocks of a resident, in table order."""
        return [self._places[block] for block in self._residents[sequence_id]]

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

    def enter(self, sequence_id: int, host_blocks: Sequence[int], step: int, *, cold: bool) -> list[tuple[int, int]]:
        """Puts a sequence on the device, for `step` at the earliest. Returns (host, device block) of those it lacked.

        cold: transfers fill them. There is room for all that `missing` names.
        """
        assert sequence_id not in self._residents
        taken = []
        for block in host_blocks:
            if block not in self._places:
                self._places[block] = self._take(cold)
                taken.append((block, self._places[block]))
            self._num_residents[block] += 1
        self._residents[sequence_id] = list(host_blocks)
        self._last_steps[sequence_id] = step - 1  # until `touch` says that a step has it
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used)
        return taken

    def extend(self, sequence_id: int, host_blocks: Sequence[int]) -> None:
        """New blocks behind those of a resident, for the next step to write to; there is room."""
        for block in host_blocks:
            assert block not in self._places
            self._places[block] = self._take(cold=False)
            self._num_residents[block] += 1
            self._residents[sequence_id].append(block)
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used)

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
        for block in self._residents.pop(sequence_id):
            self._num_residents[block] -= 1
            self._left_steps[block] = max(last_step, self._left_steps.get(block, last_step))
            if self._num_residents[block] == 0:
                del self._num_residents[block]
                self._give_back(self._left_steps.pop(block), self._places.pop(block))

    def lend(self, num_blocks: int, step: int) -> list[int]:
        """Cold blocks for this step alone; there is room."""
        blocks = [self._take(cold=True) for _ in range(num_blocks)]
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used)
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

    def _take(self, cold: bool) -> int:
        # What computing writes takes warm blocks first and leaves the cold ones to transfers.
        return self._cooling.popleft()[1] if self._cooling and not cold else self._free.pop()

    def check_integrity(self) -> None:
        counted = Counter(block for blocks in self._residents.values() for block in blocks)
        assert counted == self._num_residents, "residents miscounted"
        assert self._places.keys() == counted.keys(), "KV of nobody on the device"
        states = self._free + [block for _, block in [*self._cooling, *self._lent]] + list(self._places.values())
        assert sorted(states) == list(range(self.num_device_blocks)), "device blocks were lost or given twice"
        assert self._residents.keys() == self._last_steps.keys()
        assert self._left_steps.keys() <= counted.keys()
