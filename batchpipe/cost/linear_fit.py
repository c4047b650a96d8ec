"""The straight-line model of a decode step: seconds = alpha * sequences + beta * context tokens + delta.

PipeMax (arXiv 2605.02189, section on its decode-time estimator) schedules by it, with coefficients fitted offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchpipe.cost.model import StepWork


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Coefficients in seconds, and how far from the steps they came from: |predicted / measured - 1|."""

    alpha: float
    beta: float
    delta: float
    median_error: float
    worst_error: float

    def seconds(self, work: StepWork) -> float:
        return self.alpha * work.num_decodes + self.beta * work.decode_context_tokens + self.delta


def fit_decodes(works: Sequence[StepWork], seconds: Sequence[float]) -> DecodeFit:
    """Least squares of the relative error over steps of decodes alone; three steps that differ at least."""
    assert len(works) == len(seconds) >= 3, "three coefficients need three steps"
    assert all(work.prefill_pairs == 0 for work in works), "a step with prompts in it is no decode step"
    rows = np.array([[work.num_decodes, work.decode_context_tokens, 1.0] for work in works])
    measured = np.asarray(seconds, dtype=np.float64)
    # Columns of one size each: beta is a million times smaller than delta.
    relative = rows / measured[:, None]
    scale = np.linalg.norm(relative, axis=0)
    solution = np.linalg.lstsq(relative / scale, np.ones(len(measured)), rcond=None)[0] / scale
    errors = np.abs(rows @ solution / measured - 1.0)
    alpha, beta, delta = map(float, solution)
    return DecodeFit(alpha, beta, delta, float(np.median(errors)), float(errors.max()))
