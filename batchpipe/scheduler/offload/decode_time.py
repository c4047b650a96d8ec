"""How long a step of circulating batches takes, as a curve over its rows: quick to ask about many batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchpipe.cost.model import CostModel, StepWork
from batchpipe.predict.base import FloatArray

IntArray = NDArray[np.int64]

# Throughput within this part of the best counts as the best.
FLAT = 0.01
_PROBE_CONTEXT_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """Predicted seconds of a step on its slowest stage: a curve over rows [R + 1], and a rate a context token."""

    by_rows_seconds: FloatArray
    context_token_seconds: float

    @classmethod
    def of(cls, cost: CostModel, max_rows: int) -> DecodeTime:
        def slowest(rows: int, context_tokens: int) -> float:
            work = StepWork(rows, rows, rows, context_tokens, 0)
            return max(cost.stage_seconds(stage, work) for stage in range(cost.num_stages))

        by_rows = np.array([slowest(rows, 0) for rows in range(max_rows + 1)])
        rate = (slowest(max_rows, _PROBE_CONTEXT_TOKENS) - by_rows[-1]) / _PROBE_CONTEXT_TOKENS
        return cls(by_rows, float(rate))

    def straightened(self, max_sequences: int) -> DecodeTime:
        """PipeMax's estimate alpha * b + beta * L + delta: the line nearest to the curve up to `max_sequences`."""
        rows = np.arange(len(self.by_rows_seconds))
        alpha, delta = np.polyfit(rows[: max_sequences + 1], self.by_rows_seconds[: max_sequences + 1], 1)
        return DecodeTime(alpha * rows + delta, self.context_token_seconds)

    def seconds(self, num_rows: IntArray | int, context_tokens: IntArray | int) -> FloatArray:
        rows = np.minimum(num_rows, len(self.by_rows_seconds) - 1)
        return np.asarray(self.by_rows_seconds[rows] + self.context_token_seconds * np.asarray(context_tokens))

    def edge_sequences(self, max_sequences: int, context_tokens: float) -> int:
        """The fewest sequences of so much context each whose tokens per second are as good as the best there are."""
        numbers = np.arange(1, max_sequences + 1)
        rates = numbers / self.seconds(numbers, (numbers * context_tokens).astype(np.int64))
        return int(np.argmax(rates >= (1 - FLAT) * rates.max())) + 1

    def steady_sequences(
        self, max_sequences: int, context_tokens: float, sequence_blocks: float,
        capacity_blocks: Callable[[FloatArray], FloatArray],
    ) -> int:  # fmt: skip
        """The most sequences a batch that keep themselves: their KV is within what steps of their time can hold.

        capacity_blocks: a batch's capacity by seconds of a step. At least 1.
        """
        numbers = np.arange(1, max_sequences + 1)
        seconds = self.seconds(numbers, (numbers * context_tokens).astype(np.int64))
        kept = np.flatnonzero(numbers * sequence_blocks <= capacity_blocks(seconds))
        return int(numbers[kept[-1]]) if len(kept) else 1
