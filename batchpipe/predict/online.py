"""A predictor that begins with what classes of prompts gave elsewhere, and goes over to what this job gives.

Lengths do not carry over from one model to another, but that one class is longer than another mostly does. So the
prior's curves are first moved to the job's lengths: a length of the job stands for the length that as large a share of
the prior's rows outlive. Mixed by the job's own shares, the moved curves are exactly the job's pooled curve, for which
few completions are enough. Each class then leaves its moved curve as it gets completions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchpipe.predict.base import Classifier, FloatArray, Survival, length_grid
from batchpipe.predict.survival import LifeTable
from batchpipe.types import BoolArray, Int32Array

# Weights of what is believed beforehand, in rows: of the prior in the job's pooled curve, and of the moved curve in a
# class's own. After some hundred completions both are small.
PRIOR_ROWS = 16.0
MOVED_ROWS = 16.0


class OnlinePredictor:
    """A `LengthPredictor` around a classifier, for rows of at most `max_tokens`."""

    def __init__(self, classifier: Classifier, max_tokens: int) -> None:
        self._classifier = classifier
        self._grid_tokens = length_grid(max_tokens)
        none = np.zeros(0, np.int32)
        self._finished = self._table(none, none, np.zeros(0, np.bool_))

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return self._classifier.classify(prompts)

    def observe(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> None:
        self._finished = self._finished + self._table(classes, num_tokens, ended)

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        running = self._table(running_classes, running_tokens, np.zeros(len(running_classes), np.bool_))
        table = self._finished + running
        shares = self._shares(table)
        alive = table.alive(self._moved_prior(table, shares), MOVED_ROWS)
        pool = Survival(self._grid_tokens, (shares @ alive)[None, :])
        return Survival(self._grid_tokens, alive, self._level_error(float(table.ended.sum()), pool))

    def _level_error(self, num_ended: float, pool: Survival) -> float:
        """Of the mean of the prior, which counts for PRIOR_ROWS, and of the job's own completions: n rows of the pooled
        curve's spread.
        """
        spread = pool.sum_error(np.zeros(1, np.int32), self._grid_tokens[-1:])
        of_prior = self._classifier.level_error * PRIOR_ROWS
        return float(np.hypot(of_prior, spread * num_ended**0.5)) / (PRIOR_ROWS + num_ended)

    def _table(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> LifeTable:
        return LifeTable.of(self._grid_tokens, self._classifier.prior.num_classes, classes, num_tokens, ended)

    @staticmethod
    def _shares(table: LifeTable) -> FloatArray:
        """[C]: how the job's rows are parted into classes, evenly while there are none."""
        num_rows = table.at_risk[:, 0] + 1.0 / len(table.at_risk)
        shares: FloatArray = num_rows / num_rows.sum()
        return shares

    def _moved_prior(self, table: LifeTable, shares: FloatArray) -> FloatArray:
        """[C, G]: the prior's curves, moved so that together they are the job's pooled curve."""
        prior = self._classifier.prior
        pool = Survival(prior.grid_tokens, (shares @ prior.alive)[None, :])
        pool_here = pool.at(np.zeros(1, np.int32), self._grid_tokens[None, :].astype(np.float64))
        job = table.pooled().alive(pool_here, PRIOR_ROWS)[0]
        # Where the pooled curve is flat so is every class's, and any length of the flat piece will do.
        prior_tokens = np.interp(job, pool.alive[0, ::-1], prior.grid_tokens[::-1].astype(np.float64))
        classes = np.arange(prior.num_classes, dtype=np.int32)
        return prior.at(classes, np.broadcast_to(prior_tokens, (prior.num_classes, len(job))))
