"""The accuracy of a trained classifier on completions that it was not trained on."""

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
    """Measures over rows, with real and predicted lengths both cut at `max_tokens`, as a run with that limit does.

    accuracy: share of rows with a length in the most likely quantile of their class; the quantiles are those of
    `train.QUANTILES`. Rows that were cut too early to know their quantile do not count; None if no row counts.
    bias: predicted sum over all rows / real sum - 1.
    group_sum_error: mean of |predicted sum / real sum - 1| over random groups of `group_rows` different rows;
    unbiased_group_sum_error: the same after scaling the predictions so that bias is 0, which leaves the error that
    groups have by chance. Both are None if there are fewer rows than a group has.
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
    """`seed` determines the random groups."""
    started = time.perf_counter()
    classes = classifier.classify(examples.prompts)
    predicted = classifier.prior.expected_tokens(classes, np.full(len(classes), max_tokens, np.int32))
    seconds = time.perf_counter() - started

    real = np.minimum(examples.num_tokens, max_tokens).astype(np.float64)
    is_right = classifier.likely_quantiles()[classes] == classifier.quantiles_of(examples.num_tokens)
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
    rng = np.random.default_rng(seed)
    groups = (rng.choice(len(real), GROUP_ROWS, replace=False) for _ in range(_NUM_GROUPS))
    return float(np.mean([abs(predicted[group].sum() / real[group].sum() - 1) for group in groups]))
