"""The trained classifier: a weight a feature, summed over what a prompt has; classes are bins of that sum.

A class's curve is what rows sorted into it turned out to be, so what is sorted in wrongly is part of it, and sums over
many rows come out right however often a single row does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchpipe.predict.base import FloatArray, Survival
from batchpipe.predict.features import Int64Array, presence
from batchpipe.types import Int32Array

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LinearModel:
    """K known features [K]: their numbers, increasing; how rare each is; what each adds to a prompt's score.

    rarity is the log of one over the share of prompts that have the feature. A prompt's rarities are scaled to length
    1 before they are weighed, so long prompts do not score more for being long.
    """

    features: Int64Array
    rarity: Float32Array
    weights: Float32Array

    def scores(self, prompts: Sequence[Int32Array]) -> FloatArray:
        """[N]; the larger, the longer the completion."""
        rows, found = presence(prompts)
        places = np.minimum(np.searchsorted(self.features, found), len(self.features) - 1)
        known = self.features[places] == found
        rows, places = rows[known], places[known]
        rarity = self.rarity[places].astype(np.float64)
        sums = np.bincount(rows, weights=rarity * self.weights[places], minlength=len(prompts))
        norms = np.sqrt(np.bincount(rows, weights=rarity**2, minlength=len(prompts)))
        scores: FloatArray = sums / np.where(norms > 0, norms, 1.0)
        return scores


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A `Classifier` out of `predict.train`.

    bounds [C - 1]: class c has the scores bounds[c - 1] < score <= bounds[c]. edges_tokens [Q - 1] part the lengths
    that it was trained on into quantiles, by which it is judged: edges[q - 1] < length <= edges[q].
    """

    # Of past outputs, but seldom of this very job's rows: of a ShareGPT predictor's, prompts of one topic are 3 to 6 %
    # off beyond chance, and another kind of job may be more.
    level_error = 0.1

    model: LinearModel
    bounds: FloatArray
    edges_tokens: Int32Array
    prior: Survival

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return np.searchsorted(self.bounds, self.model.scores(prompts), side="left").astype(np.int32)

    def quantiles_of(self, num_tokens: Int32Array) -> Int32Array:
        """[N]: the quantile that rows of these lengths are in."""
        return np.searchsorted(self.edges_tokens, num_tokens, side="left").astype(np.int32)

    def likely_quantiles(self) -> Int32Array:
        """[C]: the quantile that a row of each class is most often in."""
        count = self.prior.num_classes
        edges = np.broadcast_to(self.edges_tokens.astype(np.float64), (count, len(self.edges_tokens)))
        alive = self.prior.at(np.arange(count, dtype=np.int32), edges)
        shares = -np.diff(np.hstack([np.ones((count, 1)), alive, np.zeros((count, 1))]), axis=1)
        likely: Int32Array = shares.argmax(axis=1).astype(np.int32)
        return likely
