"""One token from one row of logits, behind temperature, top-k, top-p and min-p.

Each truncation keeps an upper level set: all tokens at or above some value, so equal tokens are treated alike. Levels
are found among few candidates: a lower bound of a level, cheap to have, leaves only the tokens above it to be sorted.
Everything here sees one row alone, in one order of operations, so a row's draw cannot depend on its batch.
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
    """The token where the cumulative weight of those kept passes `uniform`, in (0, 1), of the whole.

    logits: [V], overwritten. best: the largest of them, finite. temperature: above 0.
    top_k: 0, or at least V, is off. top_p: the fewest levels that hold this share of what top_k left; 1 is off.
    min_p: a probability relative to the largest; 0 is off.
    """
    if not 0 < top_k < len(logits):
        return _draw_weighted(_weights(logits, best, temperature), top_p, min_p, uniform)
    token_ids = np.flatnonzero(logits >= kth_largest_bound(logits, top_k))
    candidates = logits[token_ids]
    kept = candidates >= np.partition(candidates, -top_k)[-top_k]
    weights = _weights(candidates[kept], best, temperature)
    return int(token_ids[kept][_draw_weighted(weights, top_p, min_p, uniform)])


def kth_largest_bound(values: NDArray[np.float32], k: int) -> np.float32:
    """A number that at least k of the values (1 <= k <= len(values)) reach: their k-th largest or a little less.

    Values are dealt into groups; k groups whose largest reaches the bound hold k values that do.
    """
    num_groups = len(values) // _TOKENS_PER_GROUP
    if k <= num_groups:
        groups = values[: num_groups * _TOKENS_PER_GROUP].reshape(_TOKENS_PER_GROUP, num_groups)
        values = groups.max(axis=0)
    return np.float32(np.partition(values, -k)[-k])


def _weights(logits: NDArray[np.float32], best: np.float32, temperature: float) -> NDArray[np.float32]:
    """Made in place: proportional to the probabilities, the largest exactly 1."""
    with np.errstate(over="ignore"):  # a hopeless token's distance may become -inf: its weight is 0
        np.subtract(logits, best, out=logits)
        np.divide(logits, temperature, out=logits)
    return np.exp(logits, out=logits)


def _draw_weighted(weights: NDArray[np.float32], top_p: float, min_p: float, uniform: float) -> int:
    """An index into weights, the largest of which is 1."""
    group_sums = _group_sums(weights)
    if top_p >= 1.0 and min_p <= 0.0:
        return _draw_untruncated(weights, group_sums, uniform)
    total = float(group_sums.sum(dtype=np.float64))
    # All weights under the first of these together are less than the share that top_p gives away.
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
    """Group g of G holds the indices g, g + G, g + 2G ...: summed row by row, fast; one more holds the remainder."""
    num_groups = len(weights) // _TOKENS_PER_GROUP
    grouped = weights[: num_groups * _TOKENS_PER_GROUP].reshape(_TOKENS_PER_GROUP, num_groups)
    remainder = weights[num_groups * _TOKENS_PER_GROUP :]
    return np.append(grouped.sum(axis=0), remainder.sum())


def _draw_untruncated(weights: NDArray[np.float32], group_sums: NDArray[np.float32], uniform: float) -> int:
    """Picks a group, then one of its indices: a cumulative sum over all of V would take longer than all else."""
    group = _pick(group_sums, uniform)
    before = group_sums[:group].sum(dtype=np.float64)
    left = float((uniform * group_sums.sum(dtype=np.float64) - before) / group_sums[group])
    num_groups = len(group_sums) - 1
    grouped_end = num_groups * _TOKENS_PER_GROUP
    start, end, step = (group, grouped_end, num_groups) if group < num_groups else (grouped_end, len(weights), 1)
    return start + step * _pick(weights[start:end:step], max(0.0, left))


def _pick(weights: NDArray[np.float32], uniform: float) -> int:
    """The first index whose cumulative weight is more than `uniform` of the whole; never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    # Rounding must not carry the target to the very end, past the last token that has a weight.
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    return int(np.searchsorted(cumulative, target, side="right"))
