"""Which sequences are evicted so that others find room on the device: those used last, as their turn is furthest away.

The host has a copy of all KV, so evicting costs nothing. Transfers run beside the step before, so they may only write
to blocks that are cold, that is, which that step does not use; what a step computes itself may go anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

from batchpipe.kv.device_cache import DeviceCache
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState


class Eviction:
    """`needed`: sequences of the step that is being planned; they and prompts under way stay on the device."""

    def __init__(self, state: SchedulerState) -> None:
        self.device_cache = DeviceCache(state.capacity.num_blocks, state.ledger.num_blocks)
        self.needed: set[int] = set()
        self._state = state
        self._cold_step = -1
        self._victims: tuple[deque[int], deque[int]] | None = None

    def begin_step(self, cold_step: int) -> None:
        """Blocks that no step after `cold_step` uses are cold."""
        self._cold_step = cold_step
        self._victims = None
        self.needed.clear()
        self.device_cache.begin_step(cold_step)

    def num_missing_blocks(self, sequence: SequenceState) -> int:
        """How many of its host blocks have no copy on the device; the sequence is not resident."""
        ledger = self._state.ledger
        if ledger.num_shared == 0:
            return sequence.allocated_tokens // ledger.block_tokens
        return self.device_cache.num_missing(ledger.owned(sequence.sequence_id))

    @property
    def max_cold_blocks(self) -> int:
        """Cold blocks there would be if all victims left; fewer where victims share blocks with others."""
        cold, _ = self._candidates()
        return self.device_cache.num_cold + sum(map(self.device_cache.num_held, filter(self._may_leave, cold)))

    def make_room_for(self, host_blocks: Sequence[int], num_warm: int) -> bool:
        """Room for those of the blocks that are not on the device, whose number evicting may raise."""
        if self._state.ledger.num_shared == 0:  # no resident has a copy of another sequence's blocks
            return self.make_room(len(host_blocks), num_warm)
        num_missing = self.device_cache.num_missing(host_blocks)
        while self.make_room(num_missing, num_warm):
            if (num_more := self.device_cache.num_missing(host_blocks)) == num_missing:
                return True
            num_missing = num_more
        return False

    def make_room(self, num_cold: int, num_warm: int) -> bool:
        """Evicts until `num_cold` blocks are free for transfers, and `num_warm` more for the step to write."""
        cache = self.device_cache
        # Blocks that a victim shares with others stay, so more victims may be needed than it seems.
        while True:
            lacking_cold = num_cold - cache.num_cold
            lacking = num_cold + num_warm - cache.num_free
            if lacking_cold <= 0 and lacking <= 0:
                return True
            cold, warm = self._candidates()
            leaving = self._victims_of(cold, lacking_cold)
            if leaving is None:
                return False
            lacking -= sum(map(cache.num_held, leaving))
            more = self._victims_of((i for i in chain(warm, cold) if i not in leaving), lacking)
            if more is None:
                return False
            for sequence_id in leaving + more:
                cache.leave(sequence_id)

    def _victims_of(self, candidates: Iterable[int], num_blocks: int) -> list[int] | None:
        """The first that may leave and hold `num_blocks` blocks together; None where all of them do not."""
        victims: list[int] = []
        if num_blocks <= 0:
            return victims
        for sequence_id in candidates:
            if self._may_leave(sequence_id):
                victims.append(sequence_id)
                num_blocks -= self.device_cache.num_held(sequence_id)
                if num_blocks <= 0:
                    return victims
        return None

    def _may_leave(self, sequence_id: int) -> bool:
        return sequence_id not in self.needed and sequence_id in self.device_cache

    def _candidates(self) -> tuple[deque[int], deque[int]]:
        """Residents when the step first asked, the latest used first: those with cold blocks, and others.

        Those that became resident since are needed. What may not leave once may not for the rest of the step.
        """
        if self._victims is None:
            prompts = {sequence.sequence_id for sequence in self._state.prefilling}
            cold: deque[int] = deque()
            warm: deque[int] = deque()
            for sequence_id, last_step in self.device_cache.latest_first():
                if sequence_id not in prompts:
                    (cold if last_step <= self._cold_step else warm).append(sequence_id)
            self._victims = cold, warm
        for candidates in self._victims:
            while candidates and not self._may_leave(candidates[0]):
                candidates.popleft()
        return self._victims
