"""Which KV comes to the device for the next batch: the window of a prefetch, and the selection in order of waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchpipe.scheduler.sequence import SequenceState

# A sequence that waited longer than this for its turn is loaded even where the link is late then.
MAX_WAIT_TURNS = 4
# Of the time, the part that the link is late at most for loads beyond the budget.
LATE_SHARE = 0.5
# This many may be passed over whose KV is more than what is left of the budget.
MAX_SKIPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchWindow:
    """What the next batch may bring to the device while the current one computes (PipeMax, arXiv 2605.02189).

    absent: ready sequences without KV on the device, those that wait longest first. limit_blocks: loads at most, by the
    prefetch budget and by the room that the previous batch leaves. max_sequences: of those loaded.
    num_missing_blocks: what one of them lacks on the device.
    resident: the batch's sequences whose KV is on the device. num_prefill_tokens: of prompts in the same step.
    step: the number of the step that is planned. num_steps_in_time: steps since loads last exceeded the budget.
    """

    absent: Sequence[SequenceState]
    limit_blocks: int
    max_sequences: int
    num_missing_blocks: Callable[[SequenceState], int]
    resident: Sequence[SequenceState]
    num_prefill_tokens: int
    step: int
    num_batches: int
    num_steps_in_time: int

    def waited_turns(self, sequence: SequenceState) -> float:
        """Turns of its batch since the sequence was part of a step."""
        return (self.step - sequence.last_step) / self.num_batches


def first_in_line(window: PrefetchWindow) -> list[SequenceState]:
    """The first of the absent whose missing blocks are within the limit together, a few passed over."""
    selected: list[SequenceState] = []
    num_skipped = num_blocks = 0
    for sequence in window.absent:
        if len(selected) >= window.max_sequences or num_skipped > MAX_SKIPS:
            break
        num_more = window.num_missing_blocks(sequence)
        # A sequence larger than the budget would never run otherwise. The link is late then, for once.
        is_overdue = (
            not selected
            and window.waited_turns(sequence) >= MAX_WAIT_TURNS
            and num_more <= LATE_SHARE * window.limit_blocks * window.num_steps_in_time
        )
        if num_blocks + num_more <= window.limit_blocks or is_overdue:
            selected.append(sequence)
            num_blocks += num_more
        else:
            num_skipped += 1
    return selected
