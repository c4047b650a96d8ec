"""Survival from rows of which some have ended and others only came so far: the life table.

In every bin of lengths, the rows that ended in it are set against those that could have: the quotient is the hazard,
and the product of what hazards leave is the curve. A row that was cut, or still runs, is at risk as far as it came and
no farther, so it biases nothing, though short rows end first. (The product-limit estimate of Kaplan and Meier, JASA 53,
1958; a cut inside a bin counts for the part of the bin that was lived through, as actuaries do.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchpipe.predict.base import FloatArray
from batchpipe.types import BoolArray, Int32Array


@dataclass(frozen=True, slots=True)
class LifeTable:
    """Rows of C classes in the B = G - 1 bins (grid[b], grid[b + 1]] of a grid: [C, B] each, and sums of tables."""

    ended: FloatArray
    at_risk: FloatArray

    @classmethod
    def of(
        cls,
        grid_tokens: Int32Array,
        num_classes: int,
        classes: Int32Array,
        num_tokens: Int32Array,
        ended: BoolArray,
    ) -> LifeTable:
        """N rows with their tokens so far; `ended` where that was all. What is longer than the grid is cut there."""
        num_bins = len(grid_tokens) - 1
        has_ended = ended & (num_tokens <= grid_tokens[-1])
        tokens = np.minimum(num_tokens, grid_tokens[-1])
        bins = np.maximum(np.searchsorted(grid_tokens, tokens, side="left") - 1, 0)
        lived = (tokens - grid_tokens[bins]) / (grid_tokens[bins + 1] - grid_tokens[bins])
        places = classes * num_bins + bins

        def count(weights: FloatArray) -> FloatArray:
            counts: FloatArray = np.bincount(places, weights=weights, minlength=num_classes * num_bins).astype(float)
            return counts.reshape(num_classes, num_bins)

        left = count(np.ones(len(places)))
        passed = np.cumsum(left[:, ::-1], axis=1)[:, ::-1] - left  # the bin, for the next one
        return cls(count(has_ended.astype(np.float64)), passed + count(np.where(has_ended, 1.0, lived)))

    def __add__(self, other: LifeTable) -> LifeTable:
        return LifeTable(self.ended + other.ended, self.at_risk + other.at_risk)

    def pooled(self) -> LifeTable:
        """All classes as one."""
        return LifeTable(self.ended.sum(axis=0, keepdims=True), self.at_risk.sum(axis=0, keepdims=True))

    def alive(self, prior_alive: FloatArray, num_prior_rows: float) -> FloatArray:
        """[C, G]: the curves, as if so many rows with the lengths of `prior_alive` [C, G] had ended before."""
        prior_at_risk = num_prior_rows * prior_alive[:, :-1]
        prior_ended = num_prior_rows * (prior_alive[:, :-1] - prior_alive[:, 1:])
        at_risk = self.at_risk + prior_at_risk
        # Where no row can be, neither seen nor imagined, nothing can live on.
        hazard = np.where(at_risk > 0, (self.ended + prior_ended) / np.where(at_risk > 0, at_risk, 1.0), 1.0)
        alive = np.ones(prior_alive.shape)
        alive[:, 1:] = np.cumprod(1.0 - np.clip(hazard, 0.0, 1.0), axis=1)
        return alive
