"""The predictor of a run: it starts with the lengths that classes of prompts had elsewhere, and learns this job's.

Lengths do not carry over from one model to another, but which class is longer than which mostly does. So the prior's
curves are quantile-mapped to the job: where the job's pooled curve has the survival p, each class takes the value that
its prior has where the prior's pooled curve has the survival p. Weighted by the shares of the classes, the mapped
curves give exactly the job's pooled curve, which a few completions determine. With completions of its own, a class's
curve then moves from the mapped prior to its Kaplan-Meier estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchpipe.predict.base import Classifier, FloatArray, Survival, length_grid
from batchpipe.predict.survival import KaplanMeier
from batchpipe.types import BoolArray, Int32Array

# Weights of priors, in rows: that of the prior's pooled curve in the job's, and that of the quantile-mapped curve in a
# class's own. After some hundred completions both matter little.
PRIOR_ROWS = 16.0
MAPPED_ROWS = 16.0


class OnlinePredictor:
    """A `LengthPredictor` around a classifier, for rows of at most `max_tokens`."""

    def __init__(self, classifier: Classifier, max_tokens: int) -> None:
        self._classifier = classifier
        self._grid_tokens = length_grid(max_tokens)
        none = np.zeros(0, np.int32)
        self._finished = self._estimate(none, none, np.zeros(0, np.bool_))

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return self._classifier.classify(prompts)

    def observe(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> None:
        self._finished = self._finished + self._estimate(classes, num_tokens, ended)

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        running = self._estimate(running_classes, running_tokens, np.zeros(len(running_classes), np.bool_))
        estimate = self._finished + running
        num_rows = estimate.at_risk[:, 0] + 1.0 / len(estimate.at_risk)  # equal shares while there are no rows
        shares = num_rows / num_rows.sum()
        alive = estimate.alive(self._quantile_mapped_prior(estimate, shares), MAPPED_ROWS)
        pool = Survival(self._grid_tokens, (shares @ alive)[None, :])
        return Survival(self._grid_tokens, alive, self._level_error(float(estimate.ended.sum()), pool))

    def _level_error(self, num_ended: float, pool: Survival) -> float:
        """The standard error of the mean length: the prior's, weighted as PRIOR_ROWS rows, and that of the mean over
        `num_ended` completions with the spread of the pooled curve.
        """
        spread = pool.sum_error(np.zeros(1, np.int32), self._grid_tokens[-1:])
        of_prior = self._classifier.level_error * PRIOR_ROWS
        return float(np.hypot(of_prior, spread * num_ended**0.5)) / (PRIOR_ROWS + num_ended)

    def _estimate(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> KaplanMeier:
        return KaplanMeier.of(self._grid_tokens, self._classifier.prior.num_classes, classes, num_tokens, ended)

    def _quantile_mapped_prior(self, estimate: KaplanMeier, shares: FloatArray) -> FloatArray:
        """[C, G]: the prior's curves on the job's lengths, so that their mean by `shares` is the job's pooled curve."""
        prior = self._classifier.prior
        pool = Survival(prior.grid_tokens, (shares @ prior.alive)[None, :])
        pool_here = pool.at(np.zeros(1, np.int32), self._grid_tokens[None, :].astype(np.float64))
        job = estimate.pooled().alive(pool_here, PRIOR_ROWS)[0]
        # Where the pooled curve is flat the curve of every class is flat too, so any length of the flat piece will do.
        prior_tokens = np.interp(job, pool.alive[0, ::-1], prior.grid_tokens[::-1].astype(np.float64))
        classes = np.arange(prior.num_classes, dtype=np.int32)
        return prior.at(classes, np.broadcast_to(prior_tokens, (prior.num_classes, len(job))))
