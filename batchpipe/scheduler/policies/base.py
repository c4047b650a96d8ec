"""The port of schedules: how much decoding and prefilling the next step holds, who is admitted, who is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState

# Admission leaves this part of the pool free for the decodes that already run, so that it does not cause preemptions.
ADMISSION_RESERVE = 0.05


@dataclass(frozen=True, slots=True)
class StepShape:
    num_decodes: int
    num_prefill_tokens: int


class Policy(Protocol):
    """Decides over a `SchedulerState`, which the scheduler changes as steps are made and come back."""

    def choose(self, state: SchedulerState) -> StepShape:
        """What the next step should hold; the scheduler fills it as far as it can."""
        ...

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        """Whether the first waiting sequence may run now. Room for its tokens so far is a must."""
        ...

    def draw(self, state: SchedulerState, num_decodes: int) -> list[SequenceState]:
        """So many of the ready sequences, or all of them; the scheduler takes them."""
        ...


class Reactive:
    """Admits whatever fits now with a small reserve, draws in order of return: what needs no forecast."""

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        reserve = min(int(state.limit_blocks * ADMISSION_RESERVE), len(state.running))
        return state.has_blocks(sequence, reserve)

    def draw(self, state: SchedulerState, num_decodes: int) -> list[SequenceState]:
        return list(islice(state.ready, num_decodes))

    def prefill_possible(self, state: SchedulerState) -> bool:
        return bool(state.prefilling) or (bool(state.waiting) and self.admits(state, state.waiting.first))
