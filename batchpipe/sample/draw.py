"""Samples one token from one row of logits, after temperature, top-k, top-p and min-p.

Each truncation keeps all tokens at or above some level, so tokens of equal weight are kept or dropped together. To find
a level without sorting the vocabulary, a cheap lower bound of it is computed first, and only the tokens above the bound
are sorted. A row is processed alone and in a fixed order of operations, so its token cannot depend on its batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOKENS_PER_GROUP = 64


def draw(
    logits: NDArray[np.float32],
    *,
    best: np.float32,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> int:
    """The first kept token at which the cumulative weight exceeds the fraction `uniform`, in (0, 1), of the total.

    logits: [V], overwritten. best: the largest of them, finite. temperature: above 0.
    top_k: 0, or at least V, is off. top_p: the share of the weight kept by top_k that the kept levels must reach; 1 is
    off. min_p: a probability relative to the largest; 0 is off.
    """
    if not 0 < top_k < len(logits):
        return _draw_weighted(_weights(logits, best, temperature), top_p, min_p, uniform)
    token_ids = np.flatnonzero(logits >= kth_largest_bound(logits, top_k))
    candidates = logits[token_ids]
    kept = candidates >= np.partition(candidates, -top_k)[-top_k]
    weights = _weights(candidates[kept], best, temperature)
    return int(token_ids[kept][_draw_weighted(weights, top_p, min_p, uniform)])


def kth_largest_bound(values: NDArray[np.float32], k: int) -> np.float32:
    """A lower bound of the k-th largest value, 1 <= k <= len(values), usually close to it.

    It is the k-th largest of the maxima of groups: the maxima of k groups reach it, so k values do.
    """
    num_groups = len(values) // _TOKENS_PER_GROUP
    if k <= num_groups:
        groups = values[: num_groups * _TOKENS_PER_GROUP].reshape(_TOKENS_PER_GROUP, num_groups)
        values = groups.max(axis=0)
    return np.float32(np.partition(values, -k)[-k])


def _weights(logits: NDArray[np.float32], best: np.float32, temperature: float) -> NDArray[np.float32]:
    """Weights proportional to the probabilities, the largest exactly 1; computed in place."""
    with np.errstate(over="ignore"):  # the logit of a very unlikely token may become -inf, and its weight 0
        np.subtract(logits, best, out=logits)
        np.divide(logits, temperature, out=logits)
    return np.exp(logits, out=logits)


def _draw_weighted(weights: NDArray[np.float32], top_p: float, min_p: float, uniform: float) -> int:
    """Samples an index of `weights`, the largest of which is 1."""
    group_sums = _group_sums(weights)
    if top_p >= 1.0 and min_p <= 0.0:
        return _draw_untruncated(weights, group_sums, uniform)
    total = float(group_sums.sum(dtype=np.float64))
    # All weights below the first of these together sum to less than the share that top_p drops.
    floor = np.float32(max((1.0 - top_p) * total / len(weights), min_p))
    indices = np.flatnonzero(weights >= floor)
    candidates = weights[indices]
    if top_p < 1.0:
        descending = np.sort(candidates)[::-1]
        last = int(np.searchsorted(np.cumsum(descending, dtype=np.float64), top_p * total))
        kept = candidates >= descending[min(last, len(descending) - 1)]
        indices, candidates = indices[kept], candidates[kept]
    return int(indices[_pick(candidates, uniform)])


def _group_sums(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of G groups of indices g, g + G, g + 2G ..., which can be added row by row, and of the remainder."""
    num_groups = len(weights) // _TOKENS_PER_GROUP
    grouped = weights[: num_groups * _TOKENS_PER_GROUP].reshape(_TOKENS_PER_GROUP, num_groups)
    remainder = weights[num_groups * _TOKENS_PER_GROUP :]
    return np.append(grouped.sum(axis=0), remainder.sum())


def _draw_untruncated(weights: NDArray[np.float32], group_sums: NDArray[np.float32], uniform: float) -> int:
    """Picks a group, then one of its indices: a cumulative sum over all of V would take longer than everything else."""
    group = _pick(group_sums, uniform)
    before = group_sums[:group].sum(dtype=np.float64)
    left = float((uniform * group_sums.sum(dtype=np.float64) - before) / group_sums[group])
    num_groups = len(group_sums) - 1
    grouped_end = num_groups * _TOKENS_PER_GROUP
    start, end, step = (group, grouped_end, num_groups) if group < num_groups else (grouped_end, len(weights), 1)
    return start + step * _pick(weights[start:end:step], max(0.0, left))


def _pick(weights: NDArray[np.float32], uniform: float) -> int:
    """The first index at which the cumulative weight exceeds `uniform` of the total; never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    # Rounding must not carry the target to the very end, past the last token that has a weight.
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    return int(np.searchsorted(cumulative, target, side="right"))
