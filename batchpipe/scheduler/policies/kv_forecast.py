"""The forecast of KV in use: blocks that all running sequences will hold some decode steps from now, as arrays.

A sequence that is alive holds its context and a token more each step; it is alive with a probability that its class's
survival curve gives for a row of its length. Sums of such are near normal, so a mean and a variance a moment say
how likely the pool is to be too small. (The memory simulation of TD-Pipe's greedy prefill, arXiv 2506.10470, with a
distribution of each length for a predicted number.)
"""

from __future__ import annotations

from collections.abc import Collection, KeysView

import numpy as np

from batchpipe.predict.base import FloatArray, Survival
from batchpipe.scheduler.sequence import SequenceState

# The forecast is a mean and this many standard deviations: blocks run out in about one forecast of twenty.
RISK_DEVIATIONS = 1.65
_FIRST_OFFSET_TOKENS = 2
_GROWTH = 1.2


class KvForecast:
    """Built from the running sequences; `add` and `remove` change one without looking at the others again."""

    def __init__(self, survival: Survival, block_tokens: int, running: Collection[SequenceState]) -> None:
        self._survival = survival
        self._block_tokens = block_tokens
        self.offsets_tokens = _offsets(int(survival.grid_tokens[-1]))
        means, variances = self._shares_of(running)
        self._shares = {s.sequence_id: (means[row], variances[row]) for row, s in enumerate(running)}
        self._last_asked: tuple[SequenceState, FloatArray, FloatArray] | None = None
        self._mean: FloatArray = means.sum(axis=0)
        self._variance: FloatArray = variances.sum(axis=0)

    @property
    def counted(self) -> KeysView[int]:
        """The sequences that the forecast counts."""
        return self._shares.keys()

    @property
    def mean_blocks(self) -> FloatArray:
        """The blocks expected to be in use at each of `offsets_tokens`."""
        return self._mean

    def peak_blocks(self) -> float:
        """What is needed at the worst moment, but for the risk taken."""
        return self._peak(self._mean, self._variance)

    def peak_blocks_with(self, sequence: SequenceState) -> tuple[float, float]:
        """What is expected at the worst moment if this sequence ran too, and what is needed but for the risk taken."""
        share_mean, share_variance = self._share_of(sequence)
        mean = self._mean + share_mean
        return float(mean.max()), self._peak(mean, self._variance + share_variance)

    def add(self, sequence: SequenceState) -> None:
        mean, variance = self._shares[sequence.sequence_id] = self._share_of(sequence)
        self._mean = self._mean + mean
        self._variance = self._variance + variance

    def remove(self, sequence_id: int) -> None:
        """The sequence has ended, or has lost its KV."""
        mean, variance = self._shares.pop(sequence_id)
        self._mean = self._mean - mean
        self._variance = np.maximum(self._variance - variance, 0.0)

    def _peak(self, mean: FloatArray, variance: FloatArray) -> float:
        """Rows err each for itself, and all together as far as their level is not known; what is held now is sure."""
        level = self._survival.level_error * mean
        level[0] = 0.0
        return float((mean + RISK_DEVIATIONS * np.sqrt(variance + level**2)).max())

    def _share_of(self, sequence: SequenceState) -> tuple[FloatArray, FloatArray]:
        # The first of the waiting sequences is asked for several times in a step, and added then.
        if self._last_asked is None or self._last_asked[0] is not sequence:
            means, variances = self._shares_of([sequence])
            self._last_asked = sequence, means[0], variances[0]
        return self._last_asked[1:]

    def _shares_of(self, sequences: Collection[SequenceState]) -> tuple[FloatArray, FloatArray]:
        """[N, M] each: mean and variance of each sequence's blocks at each of the M offsets."""
        blocks, alive = self._blocks_and_alive(sequences)
        held = blocks * alive
        return held, held * blocks * (1 - alive)

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
