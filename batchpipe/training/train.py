"""Training a classifier on past completions, with scikit-learn; predicting with it needs numpy only.

A ridge regression scores prompts, and classes are bins of the score with equal numbers of rows. The classes' curves are
measured by cross-validation: the rows of each fold are scored by a model that was trained on the other folds.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.linear_model import Ridge

from batchpipe.errors import InputError
from batchpipe.predict.base import FloatArray, Survival, length_grid
from batchpipe.predict.classifier import LinearModel, TrainedClassifier
from batchpipe.predict.features import presence
from batchpipe.predict.survival import KaplanMeier
from batchpipe.training.examples import Examples
from batchpipe.types import Int32Array

MIN_EXAMPLES = 100
# The quantiles of length by which the predictors of TD-Pipe (arXiv 2506.10470) and mu-Serve are judged.
QUANTILES = (0.25, 0.5, 0.75, 0.99)
_NUM_CLASSES = 8
_NUM_FOLDS = 5
# A feature that only one prompt has says nothing about other prompts.
_MIN_PROMPTS_OF_FEATURE = 2
# scikit-learn's alpha, chosen on split `val` of ShareGPT.
_REGULARISATION = 2.0
# Longer completions count as this quantile, because a few very long ones would dominate the regression.
_LONGEST_QUANTILE = 0.99
# Weight of the pooled curve in a class's curve, in rows: a class with few rows stays near the pooled curve.
_POOLED_ROWS = 16.0
# Weight of a straight line in the pooled curve, in rows: it counts only at lengths that no row reached.
_STRAIGHT_ROWS = 1e-3
# If rows were cut, the longest possible row is taken to be this many times the longest row seen.
_TAIL_GROWTH = 2.0


def train(examples: Examples, *, seed: int) -> TrainedClassifier:
    """A classifier and its curves. `seed` determines the folds.

    Raises InputError if there are too few examples, or if their prompts or lengths do not differ.
    """
    if len(examples) < MIN_EXAMPLES:
        raise InputError(f"{len(examples)} completions are too few to learn lengths from; bring {MIN_EXAMPLES} or more")
    edges_tokens = _edges(examples)
    folds = np.random.default_rng(seed).permutation(len(examples)) % _NUM_FOLDS
    scores = np.zeros(len(examples))
    for fold in range(_NUM_FOLDS):
        held_out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        scores[held_out] = _fit(examples.take(rest)).scores(examples.take(held_out).prompts)
    bounds = np.unique(np.quantile(scores, np.arange(1, _NUM_CLASSES) / _NUM_CLASSES))
    classes = np.searchsorted(bounds, scores, side="left").astype(np.int32)
    return TrainedClassifier(_fit(examples), bounds, edges_tokens, _curves(examples, classes, len(bounds) + 1))


def _edges(examples: Examples) -> Int32Array:
    """The quantiles of length by the Kaplan-Meier estimate, without those that are longer than every row."""
    grid_tokens = np.unique(np.append(examples.num_tokens, 0)).astype(np.int32)
    one_class = np.zeros(len(examples), np.int32)
    estimate = KaplanMeier.of(grid_tokens, 1, one_class, examples.num_tokens, examples.ended)
    alive = estimate.alive(np.ones((1, len(grid_tokens))), 0.0)[0]
    reached = [int(np.argmax(alive <= 1 - quantile)) for quantile in QUANTILES if alive[-1] <= 1 - quantile]
    edges: Int32Array = np.unique(grid_tokens[reached])
    edges = edges[edges < grid_tokens[-1]]
    if len(edges) == 0:
        raise InputError("the completions are nearly all of one length, or nearly all were cut: nothing can be learnt")
    return edges


def _fit(examples: Examples) -> LinearModel:
    """The regression of length on features. Cut rows count with the length they reached; only the order matters."""
    rows, found = presence(examples.prompts)
    features, columns, num_prompts = np.unique(found, return_inverse=True, return_counts=True)
    is_kept = (num_prompts >= _MIN_PROMPTS_OF_FEATURE) & (num_prompts < len(examples))
    if not is_kept.any():
        raise InputError("the prompts have nothing in common, or are all the same: nothing can be learnt from them")
    kept = is_kept[columns]
    rows, columns = rows[kept], (np.cumsum(is_kept) - 1)[columns[kept]]
    rarity = np.log(len(examples) / num_prompts[is_kept])
    norms = np.sqrt(np.bincount(rows, weights=rarity[columns] ** 2, minlength=len(examples)))
    shape = (len(examples), len(rarity))
    matrix = sparse.csr_matrix((rarity[columns] / norms[rows], (rows, columns)), shape=shape)
    longest = np.quantile(examples.num_tokens, _LONGEST_QUANTILE)
    lengths: FloatArray = np.minimum(examples.num_tokens, longest).astype(np.float64)
    weights = Ridge(alpha=_REGULARISATION, solver="lsqr").fit(matrix, lengths).coef_
    return LinearModel(features[is_kept], rarity.astype(np.float32), weights.astype(np.float32))


def _curves(examples: Examples, classes: Int32Array, num_classes: int) -> Survival:
    """The estimated curves. They end at 0, beyond the longest row if some rows were cut."""
    grid_tokens = length_grid(int(examples.num_tokens.max() * (1.0 if examples.ended.all() else _TAIL_GROWTH)))
    estimate = KaplanMeier.of(grid_tokens, num_classes, classes, examples.num_tokens, examples.ended)
    # The estimate says nothing beyond the longest row, where the curve falls in a straight line.
    straight = 1.0 - grid_tokens[None, :] / grid_tokens[-1]
    pool = estimate.pooled().alive(straight, _STRAIGHT_ROWS)
    return Survival(grid_tokens, estimate.alive(np.repeat(pool, num_classes, axis=0), _POOLED_ROWS))
