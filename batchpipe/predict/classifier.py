"""The trained classifier: a linear model scores a prompt by its features, and classes are bins of the score.

A class's curve is measured on rows that were sorted into it, wrongly sorted ones included. So predicted sums over many
rows are right even if the predictions for single rows are often wrong.
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
    """K known features, as arrays [K]: their numbers, in increasing order; their rarity; their weights in the score.

    A feature's rarity is log(1 / share of prompts that have it), the inverse document frequency. The vector of a
    prompt's rarities is scaled to length 1 before it is weighted, so that a long prompt scores no more for its length.
    """

    features: Int64Array
    rarity: Float32Array
    weights: Float32Array

    def scores(self, prompts: Sequence[Int32Array]) -> FloatArray:
        """[N]: a larger score means a longer completion."""
        rows, found = presence(prompts)
        columns = np.minimum(np.searchsorted(self.features, found), len(self.features) - 1)
        known = self.features[columns] == found
        rows, columns = rows[known], columns[known]
        rarity = self.rarity[columns].astype(np.float64)
        sums = np.bincount(rows, weights=rarity * self.weights[columns], minlength=len(prompts))
        norms = np.sqrt(np.bincount(rows, weights=rarity**2, minlength=len(prompts)))
        scores: FloatArray = sums / np.where(norms > 0, norms, 1.0)
        return scores


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A `Classifier` made by `batchpipe.training.train`.

    bounds [C - 1]: class c has the scores bounds[c - 1] < score <= bounds[c]. edges_tokens [Q - 1] divide the
    lengths of the training rows into quantiles, by which accuracy is measured: edges[q - 1] < length <= edges[q].
    """

    # The training rows are seldom those of this job. With a predictor trained on ShareGPT, the mean over prompts of one
    # topic is off by 3 to 6 % beyond chance; another kind of job may be off by more.
    level_error = 0.1

    model: LinearModel
    bounds: FloatArray
    edges_tokens: Int32Array
    prior: Survival

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return np.searchsorted(self.bounds, self.model.scores(prompts), side="left").astype(np.int32)

    def quantiles_of(self, num_tokens: Int32Array) -> Int32Array:
        """[N]: the quantile of each length."""
        return np.searchsorted(self.edges_tokens, num_tokens, side="left").astype(np.int32)

    def likely_quantiles(self) -> Int32Array:
        """[C]: the most likely quantile of a row of each class."""
        count = self.prior.num_classes
        edges = np.broadcast_to(self.edges_tokens.astype(np.float64), (count, len(self.edges_tokens)))
        alive = self.prior.at(np.arange(count, dtype=np.int32), edges)
        shares = -np.diff(np.hstack([np.ones((count, 1)), alive, np.zeros((count, 1))]), axis=1)
        likely: Int32Array = shares.argmax(axis=1).astype(np.int32)
        return likely
