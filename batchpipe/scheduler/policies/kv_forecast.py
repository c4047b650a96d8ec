"""The forecast of KV in use: blocks that all running sequences will hold some decode steps from now, as arrays.

A sequence that is alive holds its context and a token more each step; it is alive with a probability that its class's
survival curve gives for a row of its length. Sums of such are near normal, so a mean and a variance a moment say
how likely the pool is to be too small. (The memory simulation of TD-Pipe's greedy prefill, arXiv 2506.10470, with a
distribution of each length for a predicted number.)
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from batchpipe.predict.base import FloatArray, Survival
from batchpipe.scheduler.sequence import SequenceState

# The forecast is a mean and this many standard deviations: blocks run out in about one forecast of twenty.
RISK_DEVIATIONS = 1.65
_FIRST_OFFSET_TOKENS = 2
_GROWTH = 1.2


class KvForecast:
    """Built from the running sequences; `add` counts one more in without looking at the others again."""

    def __init__(self, survival: Survival, block_tokens: int, running: Collection[SequenceState]) -> None:
        self._survival = survival
        self._block_tokens = block_tokens
        self._last_share: tuple[SequenceState | None, FloatArray, FloatArray] = (None, np.zeros(0), np.zeros(0))
        self.offsets_tokens = _offsets(int(survival.grid_tokens[-1]))
        blocks, alive = self._blocks_and_alive(running)
        self._mean: FloatArray = (blocks * alive).sum(axis=0)
        self._variance: FloatArray = (blocks**2 * alive * (1 - alive)).sum(axis=0)

    @property
    def mean_blocks(self) -> FloatArray:
        """The blocks expected to be in use at each of `offsets_tokens`."""
        return self._mean

    def peak_blocks(self) -> float:
        """What is needed at the worst moment, but for the risk taken."""
        return self._peak(self._mean, self._variance)

    def peak_blocks_with(self, sequence: SequenceState) -> float:
        """What is needed at the worst moment, but for the risk taken, if this sequence ran too."""
        mean, variance = self._share_of(sequence)
        return self._peak(self._mean + mean, self._variance + variance)

    def add(self, sequence: SequenceState) -> None:
        mean, variance = self._share_of(sequence)
        self._mean = self._mean + mean
        self._variance = self._variance + variance

    def _peak(self, mean: FloatArray, variance: FloatArray) -> float:
        """Rows err each for itself, and all together as far as their level is not known; what is held now is sure."""
        level = self._survival.level_error * mean
        level[0] = 0.0
        return float((mean + RISK_DEVIATIONS * np.sqrt(variance + level**2)).max())

    def _share_of(self, sequence: SequenceState) -> tuple[FloatArray, FloatArray]:
        # A sequence is added right after the peak with it was asked for.
        known, mean, variance = self._last_share
        if known is not sequence:
            blocks, alive = self._blocks_and_alive([sequence])
            mean, variance = (blocks * alive)[0], (blocks**2 * alive * (1 - alive))[0]
            self._last_share = sequence, mean, variance
        return mean, variance

    def _blocks_and_alive(self, sequences: Collection[SequenceState]) -> tuple[FloatArray, FloatArray]:
        """[N, M]: blocks held while alive, and the probability of being alive, at each of the M offsets."""
        count = len(sequences)
        # What it shares is counted for the sequence that came with it.
        context = np.fromiter((s.num_tokens - s.num_shared_tokens for s in sequences), np.float64, count)
        generated = np.fromiter((len(s.generated) for s in sequences), np.float64, count)
        limit = np.fromiter((s.max_tokens for s in sequences), np.float64, count)
        classes = np.fromiter((s.length_class for s in sequences), np.int32, count)
        offsets = self.offsets_tokens[None, :]
        now = self._survival.at(classes, generated)
        later = self._survival.at(classes, generated[:, None] + offsets)
        # Where a row has outlived its curve nothing is known but its limit: it counts in full until then.
        known = now > 1e-9
        alive = np.where(known[:, None], later / np.where(known, now, 1.0)[:, None], 1.0)
        alive = np.where(offsets < (limit - generated)[:, None], alive, 0.0)
        alive[:, 0] = 1.0
        # A sequence's last block is half full on average.
        blocks = (context[:, None] + offsets + (self._block_tokens - 1) / 2) / self._block_tokens
        return blocks, np.clip(alive, 0.0, 1.0)


def _offsets(last_tokens: int) -> FloatArray:
    """Moments to look at, from now to the last token any row may have, finer at first."""
    offsets = [0.0]
    step = float(_FIRST_OFFSET_TOKENS)
    while offsets[-1] < last_tokens:
        offsets.append(offsets[-1] + step)
        step *= _GROWTH
    return np.round(np.array(offsets))
