"""Attention in float64 over whole sequences, and how far from it rounding may take a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.attention.paged_cases import PagedCase

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2  # every backend sums in float32
# How many unit roundoffs a result may be wrong by: two to three times the most seen in 800 random cases.
SCORE_ROUNDINGS = 3  # relative to scale |q|.|k|
SUM_ROUNDINGS = 16  # the exponential, the sum of weights and the weighted sum, relative to sum_j w_j |v_j|


def exact_attention(case: PagedCase) -> list[tuple[Tensor, Tensor]]:
    """Each sequence's output [length, Hq, D] in float64, and the largest rounding error of every number of it.

    To first order, scores that are wrong by up to e change the output by up to 2 e sum_j w_j |v_j|, as the weights sum
    to one. A score's error is a small constant times u scale |q|.|k|, whatever the number of terms, because the data
    have zero mean (Higham and Mary, "Sharper probabilistic backward error analysis for basic linear algebra kernels
    with random data", 2020). A softcap's slope is at most 1, so it does not add to that.

    The weights may be rounded to the stored type before they meet the values, and the output always is; below that
    type's smallest normal number such a rounding is an absolute error.
    """
    return [_exact_sequence(case, sequence) for sequence in range(len(case.lengths))]


def _exact_sequence(case: PagedCase, sequence: int) -> tuple[Tensor, Tensor]:
    query, key, value = (rows.double().transpose(0, 1) for rows in case.sequence(sequence))  # [heads, length, D]
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    weights = _weights(case, query @ key.transpose(1, 2) * case.scale)
    magnitude = weights @ value.abs()
    largest_score = (query.abs() @ key.abs().transpose(1, 2) * case.scale).amax(-1, keepdim=True)
    bound = UNIT_ROUNDOFF * (2 * SCORE_ROUNDINGS * largest_score + SUM_ROUNDINGS) * magnitude
    stored = torch.finfo(case.queries.dtype)
    if stored.eps / 2 > UNIT_ROUNDOFF:
        bound += 2 * (stored.eps / 2) * magnitude
        bound += stored.smallest_normal * (stored.eps / 2) * (1 + value.abs().sum(1, keepdim=True))
    return (weights @ value).transpose(0, 1), bound.transpose(0, 1)


def _weights(case: PagedCase, scores: Tensor) -> Tensor:
    """Scores [Hq, length, length] to the weights of the values: a row sums to 1, or to less where there are sinks."""
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    positions = torch.arange(scores.shape[1])
    distance = positions[:, None] - positions[None]
    window = len(positions) if case.sliding_window is None else case.sliding_window
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    if case.sinks is not None:
        sinks = case.sinks.double()[:, None, None].expand(-1, len(positions), 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(-1)[..., : len(positions)]
