"""Training of a classifier on past completions, with scikit-learn; what it makes is predicted with numpy alone.

A ridge regression scores prompts; classes are bins of the score that hold equally many rows. Their curves are
measured on rows that a model saw nothing of: the examples are dealt into folds, each scored by a model of the others.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.linear_model import Ridge

from batchpipe.errors import InputError
from batchpipe.predict.base import FloatArray, Survival, length_grid
from batchpipe.predict.classifier import LinearModel, TrainedClassifier
from batchpipe.predict.features import presence
from batchpipe.predict.survival import LifeTable
from batchpipe.training.examples import Examples
from batchpipe.types import Int32Array

MIN_EXAMPLES = 100
# The quantiles of length that TD-Pipe's and mu-Serve's predictors are judged by (arXiv 2506.10470).
QUANTILES = (0.25, 0.5, 0.75, 0.99)
_NUM_CLASSES = 8
_NUM_FOLDS = 5
# A feature of a single prompt says nothing about others.
_MIN_PROMPTS_OF_FEATURE = 2
# scikit-learn's alpha, chosen on split `val` of ShareGPT.
_REGULARISATION = 2.0
# A few very long completions would bend the whole regression: those beyond count as this quantile.
_LONGEST_QUANTILE = 0.99
# A class that few rows are sorted into keeps near the curve of all.
_POOLED_ROWS = 16.0
# Enough to say how the curve goes on where no row was, and nothing where there was one.
_STRAIGHT_ROWS = 1e-3
# How much longer than the longest row seen the longest row of all is taken to be, where some were cut.
_TAIL_GROWTH = 2.0


def train(examples: Examples, *, seed: int) -> TrainedClassifier:
    """A classifier and its curves. `seed` deals the folds.

    Raises InputError where the examples are too few, or have nothing to tell them apart.
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
    """Quantiles of length, cut rows reckoned with; those that no row lived to see are left out."""
    grid_tokens = np.unique(np.append(examples.num_tokens, 0)).astype(np.int32)
    one_class = np.zeros(len(examples), np.int32)
    table = LifeTable.of(grid_tokens, 1, one_class, examples.num_tokens, examples.ended)
    alive = table.alive(np.ones((1, len(grid_tokens))), 0.0)[0]
    reached = [int(np.argmax(alive <= 1 - quantile)) for quantile in QUANTILES if alive[-1] <= 1 - quantile]
    edges: Int32Array = np.unique(grid_tokens[reached])
    edges = edges[edges < grid_tokens[-1]]
    if len(edges) == 0:
        raise InputError("the completions are nearly all of one length, or nearly all were cut: nothing can be learnt")
    return edges


def _fit(examples: Examples) -> LinearModel:
    """The regression of length on features. Cut rows count as far as they came: scores are only put in order."""
    rows, found = presence(examples.prompts)
    features, places, num_prompts = np.unique(found, return_inverse=True, return_counts=True)
    is_kept = (num_prompts >= _MIN_PROMPTS_OF_FEATURE) & (num_prompts < len(examples))
    if not is_kept.any():
        raise InputError("the prompts have nothing in common, or are all the same: nothing can be learnt from them")
    kept = is_kept[places]
    rows, columns = rows[kept], (np.cumsum(is_kept) - 1)[places[kept]]
    rarity = np.log(len(examples) / num_prompts[is_kept])
    norms = np.sqrt(np.bincount(rows, weights=rarity[columns] ** 2, minlength=len(examples)))
    shape = (len(examples), len(rarity))
    matrix = sparse.csr_matrix((rarity[columns] / norms[rows], (rows, columns)), shape=shape)
    longest = np.quantile(examples.num_tokens, _LONGEST_QUANTILE)
    lengths: FloatArray = np.minimum(examples.num_tokens, longest).astype(np.float64)
    weights = Ridge(alpha=_REGULARISATION, solver="lsqr").fit(matrix, lengths).coef_
    return LinearModel(features[is_kept], rarity.astype(np.float32), weights.astype(np.float32))


def _curves(examples: Examples, classes: Int32Array, num_classes: int) -> Survival:
    """What the rows of each class turned out to be. Curves end at 0, beyond the longest row if some were cut."""
    grid_tokens = length_grid(int(examples.num_tokens.max() * (1.0 if examples.ended.all() else _TAIL_GROWTH)))
    table = LifeTable.of(grid_tokens, num_classes, classes, examples.num_tokens, examples.ended)
    # Behind the last cut row the table says nothing: there the curve falls in a straight line.
    straight = 1.0 - grid_tokens[None, :] / grid_tokens[-1]
    pool = table.pooled().alive(straight, _STRAIGHT_ROWS)
    return Survival(grid_tokens, table.alive(np.repeat(pool, num_classes, axis=0), _POOLED_ROWS))
