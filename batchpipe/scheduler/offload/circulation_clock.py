"""The time that circulating batches take: stages, and one link a stage with two directions, on a virtual clock.

A stage starts a step once it is done with the one before, the hidden states have come and, by `Window.BATCH`, the
step's loads. By `Window.LAYERS` loads come while the step runs, with room for two groups of layers: what a link slower
than the computation makes of it has a closed form, since all groups are alike. What is waited for KV is stall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from batchpipe.cost.model import CostModel
from batchpipe.scheduler.offload.circulation import CirculatedStep, Circulation
from batchpipe.scheduler.offload.residency import Window


@dataclass(frozen=True, slots=True)
class Rates:
    """What the links really carry, bytes per second; `share` of it in a step, by the step's number."""

    load_bytes_per_second: float
    store_bytes_per_second: float
    share: Callable[[int], float]


@dataclass(slots=True)
class CirculatedRun:
    """Sums over steps; those of stages are means over the stages. Blocks and sequences are of decode steps."""

    seconds: float = 0.0
    num_steps: int = 0
    busy_seconds: float = 0.0
    stall_seconds: float = 0.0
    loaded_bytes: float = 0.0
    stored_bytes: float = 0.0
    num_decodes: list[int] = field(default_factory=list)
    batch_blocks: list[int] = field(default_factory=list)
    loaded_blocks: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class CirculationClock:
    def __init__(self, cost: CostModel, rates: Rates, window: Window, num_groups: int, block_bytes: int) -> None:
        self._cost, self._rates, self._window, self._num_groups = cost, rates, window, num_groups
        self._block_bytes = block_bytes
        num_stages = cost.num_stages
        self._free = [0.0] * num_stages
        self._last_start = [0.0] * num_stages
        self._last_busy = [0.0] * num_stages
        self._loads_free = [0.0] * num_stages
        self._stores_free = [0.0] * num_stages

    def run(self, step: CirculatedStep, decided_seconds: float, block_tokens: int) -> tuple[float, float, float]:
        """The step's end on the last stage; seconds of stall and of work, means over stages."""
        num_stages, share = self._cost.num_stages, self._rates.share(step.index)
        load_seconds = step.loaded_blocks * self._block_bytes / (share * self._rates.load_bytes_per_second)
        stored_bytes = step.stored_tokens * self._block_bytes / block_tokens
        store_seconds = stored_bytes / (share * self._rates.store_bytes_per_second)
        handoff_seconds = self._cost.handoff_seconds(step.work.num_tokens)
        arrival, stall, busy = decided_seconds, 0.0, 0.0
        for stage in range(num_stages):
            work_seconds = self._cost.stage_seconds(stage, step.work)
            due = max(self._free[stage], arrival)
            start, end = self._start_and_end(stage, due, work_seconds, load_seconds)
            stall += end - due - work_seconds
            busy += work_seconds
            # KV goes to the host as it is made.
            self._stores_free[stage] = max(self._stores_free[stage], start) + store_seconds
            self._last_start[stage], self._last_busy[stage], self._free[stage] = start, work_seconds, end
            arrival = end + handoff_seconds
        return self._free[-1], stall / num_stages, busy / num_stages

    def _start_and_end(self, stage: int, due: float, work_seconds: float, load_seconds: float) -> tuple[float, float]:
        if load_seconds == 0.0:
            return due, due + work_seconds
        if self._window is Window.BATCH:
            # Blocks that fell free hold KV whose copy on the host must be whole.
            opens = max(self._last_start[stage], self._loads_free[stage], self._stores_free[stage])
            self._loads_free[stage] = opens + load_seconds
            start = max(due, self._loads_free[stage])
            return start, start + work_seconds
        group_seconds = work_seconds / self._num_groups
        # The step before has left one of the two buffers when only its last group is still to be computed.
        opens = max(self._free[stage] - self._last_busy[stage] / self._num_groups, self._loads_free[stage])
        start = max(due, opens + load_seconds / self._num_groups)
        self._loads_free[stage] = opens + load_seconds
        return start, max(start + work_seconds, self._loads_free[stage] + group_seconds)


def run_circulation(
    circulation: Circulation, cost: CostModel, rates: Rates, *, after_decision: Callable[[], None] | None = None
) -> CirculatedRun:
    """Runs all sequences to their end. `after_decision` is called after each step's."""
    manner, tiers = circulation.manner, circulation.tiers
    clock = CirculationClock(cost, rates, manner.window, manner.num_groups, tiers.block_bytes)
    in_flight: deque[tuple[CirculatedStep | None, float, float, float]] = deque()
    run = CirculatedRun()
    index = 0
    while not circulation.done:
        decided_seconds = 0.0
        if len(in_flight) == manner.num_batches:
            decided_seconds = _take(circulation, in_flight, cost.control_seconds)
        step = circulation.next_step(index)
        index += 1
        if after_decision is not None:
            after_decision()
        if step is None:
            in_flight.append((None, decided_seconds, 0.0, 0.0))
            continue
        end, stall, busy = clock.run(step, decided_seconds, tiers.block_tokens)
        in_flight.append((step, end, stall, busy))
        _count(run, step, end, stall, busy, tiers.block_bytes, tiers.block_tokens)
    return run


def _take(
    circulation: Circulation,
    in_flight: deque[tuple[CirculatedStep | None, float, float, float]],
    control_seconds: float,
) -> float:
    """Records the oldest step; when its batch's next one can be decided."""
    step, end, stall, busy = in_flight.popleft()
    if step is None:
        return end
    circulation.record(step)
    circulation.feedback.observe(stall, busy)
    return end + control_seconds


def _count(
    run: CirculatedRun, step: CirculatedStep, end: float, stall: float, busy: float, block_bytes: int,
    block_tokens: int,
) -> None:  # fmt: skip
    run.seconds = end
    run.num_steps += 1
    run.busy_seconds += busy
    run.stall_seconds += stall
    run.loaded_bytes += step.loaded_blocks * block_bytes
    run.stored_bytes += step.stored_tokens * block_bytes / block_tokens
    if len(step.running):
        run.num_decodes.append(len(step.running))
        run.batch_blocks.append(step.running_blocks)
        run.loaded_blocks.append(step.loaded_blocks)
        run.step_seconds.append(busy)
