"""Training of a classifier on past completions, with scikit-learn; what it makes is predicted with numpy alone.

Classes are quantiles of length, as in TD-Pipe (arXiv 2506.10470, section 3.3). Their curves are measured on rows that a
model saw nothing of: the examples are dealt into folds, and each fold is sorted by a model of the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from batchpipe.errors import InputError
from batchpipe.predict.base import Survival, length_grid
from batchpipe.predict.classifier import LinearModel, TrainedClassifier
from batchpipe.predict.examples import Examples
from batchpipe.predict.features import presence
from batchpipe.predict.life_table import LifeTable
from batchpipe.types import Int32Array

QUANTILES = (0.25, 0.5, 0.75, 0.99)
MIN_EXAMPLES = 100
_NUM_FOLDS = 5
_MIN_ROWS_OF_CLASS = 2 * _NUM_FOLDS
# A feature of a single prompt says nothing about others.
_MIN_PROMPTS_OF_FEATURE = 2
# scikit-learn's C, chosen on the val split of ShareGPT.
_INVERSE_REGULARISATION = 2.0
_MAX_ITERATIONS = 200
_TOLERANCE = 1e-3
# A class that few rows are sorted into keeps near the curve of all.
_POOLED_ROWS = 16.0
# Enough to say how the curve goes on where no row was, and nothing where there was one.
_STRAIGHT_ROWS = 1e-3
# How much longer than the longest row seen the longest row of all is taken to be, where some were cut.
_TAIL_GROWTH = 2.0
_UNKNOWN = -1


def train(examples: Examples, *, seed: int) -> TrainedClassifier:
    """A classifier and its curves. `seed` deals the folds.

    Raises InputError where the examples are too few, or all of about one length.
    """
    if len(examples) < MIN_EXAMPLES:
        raise InputError(f"{len(examples)} completions are too few to learn lengths from; bring {MIN_EXAMPLES} or more")
    edges_tokens = _edges(examples)
    labels = _labels(examples, edges_tokens)
    folds = _folds(labels, seed)
    said = np.zeros(len(examples), np.int32)
    for fold in range(_NUM_FOLDS):
        held_out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        said[held_out] = _fit(examples.take(rest), labels[rest]).classify(examples.take(held_out).prompts)
    prior = _curves(examples, said, len(edges_tokens) + 1)
    return TrainedClassifier(_fit(examples, labels), edges_tokens, prior)


def _edges(examples: Examples) -> Int32Array:
    """[C - 1] quantiles of length, cut rows reckoned with; one that leaves a class too few rows is left out."""
    grid_tokens = np.unique(np.append(examples.num_tokens, 0)).astype(np.int32)
    one_class = np.zeros(len(examples), np.int32)
    table = LifeTable.of(grid_tokens, 1, one_class, examples.num_tokens, examples.ended)
    alive = table.alive(np.ones((1, len(grid_tokens))), 0.0)[0]
    edges: list[int] = []
    for quantile in QUANTILES:
        reached = np.flatnonzero(alive <= 1 - quantile)
        if len(reached) == 0:
            break
        wider = np.array([*edges, grid_tokens[reached[0]]], np.int32)
        if np.bincount(_labels(examples, wider) + 1, minlength=len(wider) + 2)[1:].min() >= _MIN_ROWS_OF_CLASS:
            edges = wider.tolist()
    if not edges:
        raise InputError("the completions are nearly all of one length, or nearly all were cut: nothing can be learnt")
    return np.array(edges, np.int32)


def _labels(examples: Examples, edges_tokens: Int32Array) -> Int32Array:
    """[N] classes; a cut row is known to be of the last one, or is of none (_UNKNOWN)."""
    labels = np.searchsorted(edges_tokens, examples.num_tokens, side="left").astype(np.int32)
    cut = np.where(examples.num_tokens >= edges_tokens[-1], len(edges_tokens), _UNKNOWN)
    return np.where(examples.ended, labels, cut).astype(np.int32)


def _folds(labels: Int32Array, seed: int) -> NDArray[np.int64]:
    """[N] numbers of folds, each class dealt evenly."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    folds = np.zeros(len(labels), np.int64)
    folds[shuffled[np.argsort(labels[shuffled], kind="stable")]] = np.arange(len(labels)) % _NUM_FOLDS
    return folds


def _fit(examples: Examples, labels: Int32Array) -> LinearModel:
    known = np.flatnonzero(labels != _UNKNOWN)
    examples, labels = examples.take(known), labels[known]
    rows, found = presence(examples.prompts)
    features, places, num_prompts = np.unique(found, return_inverse=True, return_counts=True)
    is_kept = (num_prompts >= _MIN_PROMPTS_OF_FEATURE) & (num_prompts < len(examples))
    if not is_kept.any():
        raise InputError("the prompts have nothing in common, or are all the same: nothing can be learnt from them")
    rows, places = rows[is_kept[places]], (np.cumsum(is_kept) - 1)[places[is_kept[places]]]
    rarity = np.log(len(examples) / num_prompts[is_kept])
    norms = np.sqrt(np.bincount(rows, weights=rarity[places] ** 2, minlength=len(examples)))
    shape = (len(examples), len(rarity))
    matrix = sparse.csr_matrix((rarity[places] / norms[rows], (rows, places)), shape=shape)
    fit = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=_MAX_ITERATIONS, tol=_TOLERANCE).fit(matrix, labels)
    weights, bias = fit.coef_.T, fit.intercept_
    if len(fit.classes_) == 2:  # of two classes, only what speaks for the second
        weights, bias = np.hstack([0 * weights, weights]), np.append(0, bias)
    assert fit.classes_.tolist() == list(range(len(bias))), "a class without rows"
    return LinearModel(
        features[is_kept], rarity.astype(np.float32), weights.astype(np.float32), bias.astype(np.float32)
    )


def _curves(examples: Examples, said: Int32Array, num_classes: int) -> Survival:
    """What rows said to be of a class turned out to be; the curves end at 0, beyond the longest row if it was cut."""
    grid_tokens = length_grid(int(examples.num_tokens.max() * (1.0 if examples.ended.all() else _TAIL_GROWTH)))
    table = LifeTable.of(grid_tokens, num_classes, said, examples.num_tokens, examples.ended)
    # Behind the last cut row the table says nothing: there the curve falls in a straight line.
    straight = 1.0 - grid_tokens[None, :] / grid_tokens[-1]
    pool = table.pooled().alive(straight, _STRAIGHT_ROWS)
    alive = table.alive(np.repeat(pool, num_classes, axis=0), _POOLED_ROWS)
    return Survival(grid_tokens, alive)
