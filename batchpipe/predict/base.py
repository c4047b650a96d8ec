"""What a predictor of completion lengths says: a distribution a class of rows, never a single number.

Rows are sorted into a few classes before they run; a class has a survival curve, P(length > t). What the scheduler asks
(the KV in use so many steps from now, the rest of a row that runs) are sums over such curves, as arrays.
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
    """[G] lengths from 0 to max_tokens: every one up to ten, then a tenth more each time."""
    assert max_tokens >= 1
    grid = [0]
    while grid[-1] < max_tokens:
        grid.append(min(max_tokens, max(grid[-1] + 1, int(grid[-1] * _FINEST_GROWTH))))
    return np.array(grid, np.int32)


@dataclass(frozen=True, slots=True)
class Survival:
    """Curves of C classes over G lengths, linear in between: `alive[c, g]` is P(length > grid_tokens[g]).

    level_error: how far all lengths together may be off, one standard error as a part of their mean.

    grid_tokens [G] increases from 0; alive [C, G] starts at 1 and never increases. Behind the grid nothing lives.
    """

    grid_tokens: Int32Array
    alive: FloatArray
    level_error: float = 0.0

    @property
    def num_classes(self) -> int:
        return len(self.alive)

    def at(self, classes: Int32Array, tokens: FloatArray) -> FloatArray:
        """P(length > tokens) for rows of these classes; `tokens` [N] or [N, M] for N classes."""
        grid = self.grid_tokens
        right = np.clip(np.searchsorted(grid, tokens, side="right"), 1, len(grid) - 1)
        left = right - 1
        share = np.clip((tokens - grid[left]) / (grid[right] - grid[left]), 0.0, 1.0)
        rows = classes.reshape(-1, *[1] * (np.ndim(tokens) - 1))
        alive: FloatArray = self.alive[rows, left] * (1 - share) + self.alive[rows, right] * share
        return np.where(tokens > grid[-1], 0.0, alive)

    def expected_tokens(self, classes: Int32Array, max_tokens: Int32Array) -> FloatArray:
        """The mean of min(length, max_tokens), a row each: the sum of P(length > t) for t = 0 .. max_tokens - 1.

        It is the area under the curve, and half of what the curve falls, for lengths are whole numbers.
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
        """The mean of min(length, max_tokens) - num_tokens of rows that came so far and have not ended, a row each.

        At least one token: who is longer than the curve goes on all the same.
        """
        more = self.expected_tokens(classes, max_tokens) - self.expected_tokens(classes, num_tokens)
        alive = np.maximum(self.at(classes, num_tokens.astype(np.float64)), 1e-9)
        return np.clip(more / alive, 1.0, np.maximum(max_tokens - num_tokens, 1))

    def variances(self, classes: Int32Array, max_tokens: Int32Array) -> FloatArray:
        """The variance of min(length, max_tokens) in square tokens, a row each: from the integral of 2 t P(length > t).

        The integral takes a row that ends to be at any point of its last token; a whole length has a square that is
        larger by that point and a sixth.
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
        """One standard error of the sum of min(length, max_tokens) over these rows, as a part of it.

        Rows err each for itself, and all together as far as their level is not known.
        """
        deviation = np.sqrt(self.variances(classes, max_tokens).sum())
        return float(np.hypot(deviation / self.expected_tokens(classes, max_tokens).sum(), self.level_error))

    def stretched(self, factor: float) -> Survival:
        """Curves on which so many times fewer rows end at every length: a limit cuts what it would cut."""
        return Survival(self.grid_tokens, self.alive ** (1.0 / factor), self.level_error)


def _second_moment(left: FloatArray, right: FloatArray, alive_left: FloatArray, alive_right: FloatArray) -> FloatArray:
    """The integral of 2 t P(length > t) between points where the curve is a straight line."""
    ends = left * alive_left + right * alive_right
    return (right - left) / 3 * (ends + (left + right) * (alive_left + alive_right))


class Classifier(Protocol):
    """Sorts rows into classes by their prompts, and knows what lengths such classes had elsewhere."""

    @property
    def prior(self) -> Survival:
        """Curves that end at 0, so that whatever share of rows lives longest has its place in them."""
        ...

    @property
    def level_error(self) -> float:
        """How far a job's mean length may be from that of the curves: one standard error, as a part of the mean."""
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
        """Takes in completions; `ended` is False for one that was cut at its max_tokens: it would have gone on."""
        ...

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        """What is known now. Rows that still run, with their tokens so far, keep early finishers from biasing it."""
        ...
