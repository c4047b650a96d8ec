"""How good a trained classifier is on completions that it did not learn from."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from batchpipe.predict.base import FloatArray
from batchpipe.predict.classifier import TrainedClassifier
from batchpipe.training.examples import Examples

GROUP_ROWS = 256
_NUM_GROUPS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Over rows whose real and predicted lengths are both cut at `max_tokens`, as a run with that limit would.

    accuracy: share of rows in the quantile (25, 50, 75 and 99 % of the training's lengths) that is the likeliest of
    their class; rows cut too early to know their quantile are left out of it, and None is said where all were.
    bias: predicted sum of all rows over the real one, less 1.
    group_sum_error: mean of |predicted sum / real sum - 1| over groups of `group_rows` different rows drawn at random;
    unbiased_group_sum_error: the same after the predictions are scaled so that their sum over all rows is right, which
    is what groups differ by chance. Both None where the rows are fewer than a group.
    """

    num_rows: int
    max_tokens: int
    accuracy: float | None
    mean_absolute_error_tokens: float
    bias: float
    group_rows: int
    group_sum_error: float | None
    unbiased_group_sum_error: float | None
    microseconds_per_row: float


def evaluate(classifier: TrainedClassifier, examples: Examples, *, max_tokens: int, seed: int) -> Evaluation:
    """`seed` draws the groups."""
    started = time.perf_counter()
    classes = classifier.classify(examples.prompts)
    predicted = classifier.prior.expected_tokens(classes, np.full(len(classes), max_tokens, np.int32))
    seconds = time.perf_counter() - started

    real = np.minimum(examples.num_tokens, max_tokens).astype(np.float64)
    said = classifier.likely_quantiles()[classes]
    is_right = said == classifier.quantiles_of(examples.num_tokens)
    is_known = examples.ended | (examples.num_tokens > classifier.edges_tokens[-1])
    has_groups = len(examples) >= GROUP_ROWS
    unbiased = predicted * (real.sum() / predicted.sum())
    return Evaluation(
        num_rows=len(examples),
        max_tokens=max_tokens,
        accuracy=float(is_right[is_known].mean()) if is_known.any() else None,
        mean_absolute_error_tokens=float(np.abs(predicted - real).mean()),
        bias=float(predicted.sum() / real.sum() - 1),
        group_rows=GROUP_ROWS,
        group_sum_error=group_sum_error(predicted, real, seed=seed) if has_groups else None,
        unbiased_group_sum_error=group_sum_error(unbiased, real, seed=seed) if has_groups else None,
        microseconds_per_row=seconds / len(examples) * 1e6,
    )


def group_sum_error(predicted: FloatArray, real: FloatArray, *, seed: int) -> float:
    """Mean of |predicted sum / real sum - 1| over random groups of GROUP_ROWS different rows."""
    assert len(real) >= GROUP_ROWS
    draw = np.random.default_rng(seed)
    groups = (draw.choice(len(real), GROUP_ROWS, replace=False) for _ in range(_NUM_GROUPS))
    return float(np.mean([abs(predicted[group].sum() / real[group].sum() - 1) for group in groups]))
