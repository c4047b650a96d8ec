"""The Kaplan-Meier estimate of survival curves from rows of which some are censored: cut, or still running.

Lengths are put into bins. The hazard of a bin is the number of rows that ended in it over the number that could have
(the rows at risk), and the curve is the running product of 1 - hazard. A censored row is at risk up to the length that
it reached and not beyond, so it does not bias the curve, although short rows are the first to end. A row that is
censored inside a bin counts there for the part of the bin that it passed, as in actuarial tables. Source: Kaplan and
Meier, "Nonparametric estimation from incomplete observations", JASA 53, 1958.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchpipe.predict.base import FloatArray
from batchpipe.types import BoolArray, Int32Array


@dataclass(frozen=True, slots=True)
class KaplanMeier:
    """Rows of C classes that ended, and that were at risk, in B = G - 1 bins (grid[b], grid[b + 1]]: [C, B] each.

    The estimates of two disjoint sets of rows can be added.
    """

    ended: FloatArray
    at_risk: FloatArray

    @classmethod
    def of(
        cls, grid_tokens: Int32Array, num_classes: int, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray
    ) -> KaplanMeier:
        """N rows with their classes and tokens so far [N]; `ended` is False for censored rows.

        Rows beyond the last length of the grid are censored there.
        """
        num_bins = len(grid_tokens) - 1
        has_ended = ended & (num_tokens <= grid_tokens[-1])
        tokens = np.minimum(num_tokens, grid_tokens[-1])
        bins = np.maximum(np.searchsorted(grid_tokens, tokens, side="left") - 1, 0)
        passed = (tokens - grid_tokens[bins]) / (grid_tokens[bins + 1] - grid_tokens[bins])
        cells = classes * num_bins + bins

        def count(weights: FloatArray) -> FloatArray:
            counts: FloatArray = np.bincount(cells, weights=weights, minlength=num_classes * num_bins).astype(float)
            return counts.reshape(num_classes, num_bins)

        last_seen = count(np.ones(len(cells)))
        seen_later = np.cumsum(last_seen[:, ::-1], axis=1)[:, ::-1] - last_seen
        return cls(count(has_ended.astype(np.float64)), seen_later + count(np.where(has_ended, 1.0, passed)))

    def __add__(self, other: KaplanMeier) -> KaplanMeier:
        return KaplanMeier(self.ended + other.ended, self.at_risk + other.at_risk)

    def pooled(self) -> KaplanMeier:
        """All classes as a single one."""
        return KaplanMeier(self.ended.sum(axis=0, keepdims=True), self.at_risk.sum(axis=0, keepdims=True))

    def alive(self, prior_alive: FloatArray, num_prior_rows: float) -> FloatArray:
        """[C, G]: the curves, with the prior `prior_alive` [C, G] weighted as `num_prior_rows` more rows per class."""
        prior_at_risk = num_prior_rows * prior_alive[:, :-1]
        prior_ended = num_prior_rows * (prior_alive[:, :-1] - prior_alive[:, 1:])
        at_risk = self.at_risk + prior_at_risk
        # A bin with no row at risk, neither seen nor of the prior, ends the curve.
        hazard = np.where(at_risk > 0, (self.ended + prior_ended) / np.where(at_risk > 0, at_risk, 1.0), 1.0)
        alive = np.ones(prior_alive.shape)
        alive[:, 1:] = np.cumprod(1.0 - np.clip(hazard, 0.0, 1.0), axis=1)
        return alive
