"""Common beginnings of prompts beyond the blocks that they share: their KV is copied from a sequence that has it.

Most prompts of a chat begin with the same few tokens, fewer than a block holds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from batchpipe.scheduler.sequence import SequenceState
from batchpipe.types import Int32Array

# A beginning shorter than this is computed anew: copying its block costs about as much.
MIN_COPIED_TOKENS = 8


class PrefixCopies:
    """Remembers one running sequence, the donor, and how much of its prompt has KV once the steps so far are done."""

    def __init__(self) -> None:
        self._donor: SequenceState | None = None
        self._num_known = 0

    def learn(self, sequence: SequenceState) -> None:
        """The step just built completes this sequence's prompt: later steps may copy from it."""
        self._donor, self._num_known = sequence, len(sequence.prompt)

    def forget(self, sequence: SequenceState, running: Iterable[SequenceState]) -> None:
        """The sequence gives its blocks back; if it was the donor, the oldest running one takes its place."""
        if self._donor is not sequence:
            return
        self._donor = next(iter(running), None)
        self._num_known = 0 if self._donor is None else min(self._donor.num_scheduled, len(self._donor.prompt))

    def take(self, sequence: SequenceState) -> tuple[SequenceState, int] | None:
        """The sequence to copy from for a newly admitted one, and the number of first tokens that both have.

        The new one's last token is always computed, and its first `num_scheduled` tokens, which have KV, do not count.
        """
        if self._donor is None:
            return None
        known = self._donor.prompt[: self._num_known]
        num_alike = common_length(known, sequence.prompt[: sequence.num_tokens - 1])
        if num_alike < sequence.num_scheduled + MIN_COPIED_TOKENS:
            return None
        return self._donor, num_alike


def common_length(first: Int32Array, second: Int32Array) -> int:
    """The number of first tokens that two prompts share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
