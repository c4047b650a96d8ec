"""Which of the ready sequences form the next decode batch, so that all batches in flight take equal time.

TD-Pipe's work stealing between batches (arXiv 2506.10470) balances the number of sequences; batches of one size but
unequal contexts still take unequal time, and every stage waits for the slowest. Here the number and the context are
balanced: of the ready sequences the oldest in line are taken, then single ones are exchanged against those left over
until the batch's context is near its share. Those left over are first in line the next time, so none is left over twice
in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchpipe.scheduler.sequence import SequenceState

# Batches whose contexts differ by less take the same time.
CLOSE = 0.001


def balanced_selection(ready: Sequence[SequenceState], num_decodes: int, target_tokens: float) -> list[SequenceState]:
    """`num_decodes` of `ready` (in line: longest waiting first) whose contexts add up to about `target_tokens`."""
    if len(ready) <= num_decodes:
        return list(ready)
    contexts = np.fromiter((sequence.num_tokens for sequence in ready), np.int64, len(ready))
    chosen = np.zeros(len(ready), dtype=np.bool_)
    chosen[:num_decodes] = True
    # The first in line were left over before, at most the number that is left over now: they stay.
    num_fixed = min(num_decodes, len(ready) - num_decodes)
    excess = float(contexts[:num_decodes].sum()) - target_tokens
    for candidate in range(num_decodes, len(ready)):
        if abs(excess) <= CLOSE * target_tokens:
            break
        movable = np.flatnonzero(chosen[num_fixed:num_decodes]) + num_fixed
        if not len(movable):
            break
        changes = contexts[candidate] - contexts[movable]
        best = int(np.abs(excess + changes).argmin())
        if abs(excess + changes[best]) < abs(excess):
            chosen[movable[best]] = False
            chosen[candidate] = True
            excess += float(changes[best])
    return [ready[index] for index in np.flatnonzero(chosen).tolist()]
