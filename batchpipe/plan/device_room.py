"""Who leaves the device so that others find room there: whoever was used last, as its turn is furthest away.

The host has a copy of all KV, so leaving costs nothing. Transfers run beside the step before, so they may only write to
blocks that are cold, that is, which that step does not use; what a step computes itself may go anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence as List

from batchpipe.kv.residency import Residency
from batchpipe.plan.sequence import Sequence
from batchpipe.plan.state import State


class DeviceRoom:
    """`needed`: sequences of the step that is being planned; they and prompts under way stay on the device."""

    def __init__(self, state: State) -> None:
        self.residency = Residency(state.capacity.num_blocks)
        self.needed: set[int] = set()
        self._state = state
        self._cold_step = -1

    def begin_step(self, cold_step: int) -> None:
        """Blocks that no step after `cold_step` uses are cold."""
        self._cold_step = cold_step
        self.needed.clear()
        self.residency.begin_step(cold_step)

    def missing(self, sequence: Sequence) -> list[int]:
        """Those of its host blocks that have no copy on the device."""
        return self.residency.missing(self._state.ledger.owned(sequence.sequence_id))

    @property
    def most_cold_blocks(self) -> int:
        """Cold blocks there would be if all left who may; fewer where victims share blocks with others."""
        cold, _ = self._victims()
        return self.residency.num_cold + sum(map(self.residency.num_held, cold))

    def make_for(self, host_blocks: List[int], num_warm: int) -> bool:
        """Room for those of the blocks that are not on the device: evicting may make them more."""
        num_missing = len(self.residency.missing(host_blocks))
        while self.make(num_missing, num_warm):
            if (num_more := len(self.residency.missing(host_blocks))) == num_missing:
                return True
            num_missing = num_more
        return False

    def make(self, num_cold: int, num_warm: int) -> bool:
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
        kept = self.needed.union(sequence.sequence_id for sequence in self._state.prefilling)
        cold: list[int] = []
        warm: list[int] = []
        for sequence_id, last_step in self.residency.latest_first():
            if sequence_id not in kept:
                (cold if last_step <= self._cold_step else warm).append(sequence_id)
        return cold, warm
