"""Predicted completion lengths: a distribution for each class of rows, never a single number for a row.

Rows are sorted into a few classes before they run, and each class has a survival curve, P(length > t). The scheduler
computes what it needs (KV in use a number of steps ahead, tokens that a running row has left) from these curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import BoolArray, Int32Array

FloatArray = NDArray[np.float64]

_FINEST_GROWTH = 1.1


def length_grid(max_tokens: int) -> Int32Array:
    """[G] lengths from 0 to max_tokens: steps of 1 up to about twenty, then steps of a tenth of the length."""
    assert max_tokens >= 1
    grid = [0]
    while grid[-1] < max_tokens:
        grid.append(min(max_tokens, max(grid[-1] + 1, int(grid[-1] * _FINEST_GROWTH))))
    return np.array(grid, np.int32)


@dataclass(frozen=True, slots=True)
class Survival:
    """Survival curves of C classes at G lengths: `alive[c, g]` is P(length > grid_tokens[g]).

    grid_tokens [G] increases from 0. alive [C, G] starts at 1 and never increases; between two lengths of the grid it
    is linear, beyond the last it is 0. level_error is the standard error that all lengths share, relative to the mean.
    """

    grid_tokens: Int32Array
    alive: FloatArray
    level_error: float = 0.0

    @property
    def num_classes(self) -> int:
        return len(self.alive)

    def at(self, classes: Int32Array, tokens: FloatArray) -> FloatArray:
        """P(length > tokens) for N rows of the given classes; `tokens` is [N] or [N, M], and so is the result."""
        grid = self.grid_tokens
        right = np.clip(np.searchsorted(grid, tokens, side="right"), 1, len(grid) - 1)
        left = right - 1
        share = np.clip((tokens - grid[left]) / (grid[right] - grid[left]), 0.0, 1.0)
        rows = classes.reshape(-1, *[1] * (np.ndim(tokens) - 1))
        alive: FloatArray = self.alive[rows, left] * (1 - share) + self.alive[rows, right] * share
        return np.where(tokens > grid[-1], 0.0, alive)

    def expected_tokens(self, classes: Int32Array, max_tokens: Int32Array) -> FloatArray:
        """[N]: the mean of min(length, max_tokens) of each row, which is the sum of P(length > t) for t < max_tokens.

        The sum is the area under the curve plus half of the curve's fall (Euler-Maclaurin): lengths are whole numbers.
        """
        widths = np.diff(self.grid_tokens)
        areas = np.zeros(self.alive.shape)
        areas[:, 1:] = np.cumsum((self.alive[:, :-1] + self.alive[:, 1:]) / 2 * widths, axis=1)
        limit = np.minimum(max_tokens, self.grid_tokens[-1])
        left = np.searchsorted(self.grid_tokens, limit, side="right") - 1
        rest = limit - self.grid_tokens[left]
        ends = self.at(classes, limit.astype(np.float64))
        expected: FloatArray = areas[classes, left] + (self.alive[classes, left] + ends) / 2 * rest + (1 - ends) / 2
        return expected

    def expected_left(self, classes: Int32Array, num_tokens: Int32Array, max_tokens: Int32Array) -> FloatArray:
        """[N]: the mean of min(length, max_tokens) - num_tokens of rows that have num_tokens and have not ended.

        At least 1, also for a row that is already longer than its curve.
        """
        more = self.expected_tokens(classes, max_tokens) - self.expected_tokens(classes, num_tokens)
        alive = np.maximum(self.at(classes, num_tokens.astype(np.float64)), 1e-9)
        return np.clip(more / alive, 1.0, np.maximum(max_tokens - num_tokens, 1))

    def variances(self, classes: Int32Array, max_tokens: Int32Array) -> FloatArray:
        """[N]: the variance of min(length, max_tokens) of each row, in square tokens.

        The second moment is the integral of 2 t P(length > t), which spreads a row's end evenly over its last token;
        `ended_at` and the sixth correct it, because lengths are whole numbers.
        """
        grid = self.grid_tokens.astype(np.float64)
        squares = np.zeros(self.alive.shape)
        squares[:, 1:] = np.cumsum(_second_moment(grid[:-1], grid[1:], self.alive[:, :-1], self.alive[:, 1:]), axis=1)
        limit = np.minimum(max_tokens, grid[-1])
        left = np.searchsorted(grid, limit, side="right") - 1
        ends = self.at(classes, limit)
        second = squares[classes, left] + _second_moment(grid[left], limit, self.alive[classes, left], ends)
        mean = self.expected_tokens(classes, max_tokens)
        ended_at = mean - limit * ends - (1 - ends) / 2
        variances: FloatArray = np.maximum(second + ended_at + (1 - ends) / 6 - mean**2, 0.0)
        return variances

    def sum_error(self, classes: Int32Array, max_tokens: Int32Array) -> float:
        """The standard error of the sum of min(length, max_tokens) over these rows, relative to the sum.

        It combines the independent errors of the rows with the error of the level, which they share.
        """
        deviation = np.sqrt(self.variances(classes, max_tokens).sum())
        return float(np.hypot(deviation / self.expected_tokens(classes, max_tokens).sum(), self.level_error))

    def stretched(self, factor: float) -> Survival:
        """The curves with a hazard that is `factor` times smaller at every length."""
        return Survival(self.grid_tokens, self.alive ** (1.0 / factor), self.level_error)


def _second_moment(left: FloatArray, right: FloatArray, alive_left: FloatArray, alive_right: FloatArray) -> FloatArray:
    """The integral of 2 t P(length > t) from `left` to `right`, between which the curve is a straight line."""
    ends = left * alive_left + right * alive_right
    return (right - left) / 3 * (ends + (left + right) * (alive_left + alive_right))


class Classifier(Protocol):
    """Sorts rows into classes by their prompts, and has prior curves of the classes, from other jobs or models."""

    @property
    def prior(self) -> Survival:
        """Curves that end at 0, so that each survival probability from 0 to 1 has a length."""
        ...

    @property
    def level_error(self) -> float:
        """The standard error of the curves' mean length for a job not seen before, relative to the mean."""
        ...

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        """The class of each prompt, from its token ids."""
        ...


class LengthPredictor(Protocol):
    """Sorts rows into classes, and learns the classes' lengths from the job's own finished rows."""

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        """The class of each prompt, from its token ids."""
        ...

    def observe(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> None:
        """Learns completion lengths [N]; `ended` is False for a completion that was cut at its max_tokens."""
        ...

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        """The current curves. Running rows count as censored at their tokens so far, else short rows bias it."""
        ...
