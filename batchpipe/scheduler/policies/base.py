"""The port of policies: what the next step should hold, which request is admitted, which sequences decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from batchpipe.scheduler.offload.selection import PrefetchWindow, first_in_line
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState

# Admission leaves this part of the pool free for the decodes that already run, so that it does not cause preemptions.
ADMISSION_RESERVE = 0.05


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step holds at most: `num_decodes` sequences that draw a token, `num_prefill_tokens` tokens of prompts.

    is_last_resort: nothing is in flight, so the oldest ready sequence may evict every other one to go on.
    """

    num_decodes: int
    num_prefill_tokens: int
    is_last_resort: bool = False


class Policy(Protocol):
    """Decides over a `SchedulerState`, which the scheduler changes as steps are made and come back."""

    def choose(self, state: SchedulerState) -> StepShape:
        """What the next step should hold; the scheduler fills it as far as it can."""
        ...

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        """Whether the first waiting sequence may run now. There must be room for its tokens so far."""
        ...

    def select(
        self, state: SchedulerState, candidates: Sequence[SequenceState], num_decodes: int, context_tokens: float
    ) -> list[SequenceState]:
        """`num_decodes` of the ready candidates, which stand in order of return, or all where they are fewer.

        context_tokens: what the contexts of the selected come to in a batch that takes as long as the others do.
        """
        ...

    def select_prefetch(self, state: SchedulerState, window: PrefetchWindow) -> list[SequenceState]:
        """The ready sequences without KV on the device that decode too: it comes from host memory for them."""
        ...


class FirstInLine:
    """Selects in order of return: the sequences that wait longest."""

    def select(
        self, state: SchedulerState, candidates: Sequence[SequenceState], num_decodes: int, context_tokens: float
    ) -> list[SequenceState]:
        return list(candidates[:num_decodes])

    def select_prefetch(self, state: SchedulerState, window: PrefetchWindow) -> list[SequenceState]:
        return first_in_line(window)


class Reactive(FirstInLine):
    """Admits whatever fits now, with a small reserve: what needs no forecast."""

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        reserve = min(int(state.limit_blocks * ADMISSION_RESERVE), len(state.running))
        return state.has_blocks(sequence, reserve)
