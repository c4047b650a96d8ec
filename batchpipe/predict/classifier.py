"""The trained classifier: a weight a feature and class, summed over what a prompt has; the largest sum wins.

Its curves are those of the class it says, not of the true one: what is sorted in wrongly is part of them, so that sums
over many rows come out right however often a single row does not.
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
    """K known features and C classes.

    features [K]: their numbers, increasing; rarity [K]: what a feature counts, the log of one over its frequency;
    weights [K, C] and bias [C]: of a prompt's rarities, scaled to length 1.
    """

    features: Int64Array
    rarity: Float32Array
    weights: Float32Array
    bias: Float32Array

    def scores(self, prompts: Sequence[Int32Array]) -> FloatArray:
        """[N, C]; the class with the largest score is the one meant."""
        rows, found = presence(prompts)
        places = np.minimum(np.searchsorted(self.features, found), len(self.features) - 1)
        known = self.features[places] == found
        rows, places = rows[known], places[known]
        rarity = self.rarity[places].astype(np.float64)
        norms = np.sqrt(np.bincount(rows, weights=rarity**2, minlength=len(prompts)))
        norms[norms == 0] = 1.0
        columns = [
            np.bincount(rows, weights=rarity * self.weights[places, column], minlength=len(prompts)) / norms
            for column in range(len(self.bias))
        ]
        return np.stack(columns, axis=1) + self.bias

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        classes: Int32Array = self.scores(prompts).argmax(axis=1).astype(np.int32)
        return classes


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A `Classifier` out of `predict.train`. `edges_tokens` [C - 1]: class c is edges[c - 1] < length <= edges[c]."""

    model: LinearModel
    edges_tokens: Int32Array
    prior: Survival

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return self.model.classify(prompts)

    def true_classes(self, num_tokens: Int32Array) -> Int32Array:
        """The class that rows of these lengths should have been given."""
        return np.searchsorted(self.edges_tokens, num_tokens, side="left").astype(np.int32)
