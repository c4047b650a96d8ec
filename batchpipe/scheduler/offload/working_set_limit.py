"""How much KV running sequences may hold where the device has room for a part of it.

The capacity law says what a link can keep in motion. Where several batches are in flight their loads are hidden behind
each other. A step then uses all of the device and of the link whatever the number of sequences that wait for a turn,
and more of them keep it full for longer: the tail of a job is short where its last rows began early. A single batch
never hides all loads: its first layer waits. Pie lets its share grow while swaps stay hidden and throughput rises
(arXiv 2411.09317); here a single batch swaps what the law says, where that is predicted to raise tokens per second.
"""

from __future__ import annotations

from batchpipe.kv.capacity_law import batch_capacity_blocks
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_time import StepTime

# Predictions err, and moving costs more than they know: a larger batch has to bring this much.
LEAST_GAIN = 0.02
# Where loads are hidden, this many blocks may be in use for each one that the law keeps in motion.
WAITING_TURNS = 4
# An answer stands for this many steps.
RECONSIDER_STEPS = 32


class WorkingSetLimit:
    """`blocks` before every step. num_buffers: as `batch_capacity_blocks` has it."""

    def __init__(self, state: SchedulerState, budget: PrefetchBudget, step_time: StepTime, num_buffers: float) -> None:
        self._state = state
        self._budget = budget
        self._step_time = step_time
        self._num_buffers = num_buffers
        self._pays = True
        self._num_steps_left = 0

    def blocks(self) -> int:
        """At least what the device holds, at most what the host does."""
        capacity, num_host = self._state.capacity, self._state.ledger.num_blocks
        num_device = capacity.num_blocks
        num_loaded = self._budget.blocks(self._step_time.decode_seconds)
        each = batch_capacity_blocks(num_device, num_loaded, capacity.max_batches, self._num_buffers)
        num_moving = max(0, int(capacity.max_batches * each) - num_device)
        if self._budget.hides_all:
            return min(num_device + WAITING_TURNS * num_moving, num_host)
        by_law = min(num_device + num_moving, num_host)
        if self._num_steps_left > 0:
            self._num_steps_left -= 1
        elif self._state.running:
            self._pays = self._is_faster(by_law, num_loaded)
            self._num_steps_left = RECONSIDER_STEPS
        return by_law if self._pays else num_device

    def _is_faster(self, num_blocks: int, num_loaded: int) -> bool:
        """Whether a batch of `num_blocks` blocks, of which a step loads some, draws more tokens per second than one
        that the device holds. It is taken to where no time is known.
        """
        alone = self._decodes_per_second(self._state.capacity.num_blocks, 0)
        moving = self._decodes_per_second(num_blocks, num_loaded)
        return alone is None or moving is None or moving >= (1 + LEAST_GAIN) * alone

    def _decodes_per_second(self, num_blocks: int, num_loaded: int) -> float | None:
        """Of the number of sequences like the running ones that find room in `num_blocks` blocks."""
        state = self._state
        num_running = len(state.running) * num_blocks / max(1, state.ledger.num_used)
        num_decodes = max(1, round(min(num_running, state.max_running) / state.capacity.max_batches))
        seconds = self._step_time.seconds_of(num_decodes, 0)
        if not seconds:
            return None
        return num_decodes / (seconds + self._budget.exposed_seconds(num_loaded))
