"""What a predictor of completion lengths says: a distribution a class of rows, never a single number.

Rows are sorted into a few classes before they run; a class has a survival curve, P(length > t). What the planner asks
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


@dataclass(frozen=True, slots=True)
class Survival:
    """Curves of C classes over G lengths, linear in between: `alive[c, g]` is P(length > grid_tokens[g]).

    grid_tokens [G] increases from 0; alive [C, G] starts at 1 and never increases. Behind the grid nothing lives.
    """

    grid_tokens: Int32Array
    alive: FloatArray

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
        """The mean of min(length, max_tokens), a row each: the area under the curve up to max_tokens."""
        widths = np.diff(self.grid_tokens)
        areas = np.zeros(self.alive.shape)
        areas[:, 1:] = np.cumsum((self.alive[:, :-1] + self.alive[:, 1:]) / 2 * widths, axis=1)
        limit = np.minimum(max_tokens, self.grid_tokens[-1])
        left = np.searchsorted(self.grid_tokens, limit, side="right") - 1
        rest = limit - self.grid_tokens[left]
        ends = self.at(classes, limit.astype(np.float64))
        expected: FloatArray = areas[classes, left] + (self.alive[classes, left] + ends) / 2 * rest
        return expected


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
