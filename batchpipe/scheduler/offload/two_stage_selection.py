"""PipeMax's two-stage greedy selection (arXiv 2605.02189): a greedy fill of the prefetch budget, then refinement.

The selected sequences should use up the budget and make the next batch take as long as the others do: a batch's time
depends on its number of sequences and on their context, its loads on their context alone. The paper does not state its
inequalities; they are rebuilt here from its description.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchpipe.cost.model import CostModel, StepWork, bottleneck_seconds
from batchpipe.predict.base import FloatArray
from batchpipe.types import BoolArray

IntArray = NDArray[np.int64]

# A batch may be predicted to take this part longer than the others, so that batches can grow.
TIME_SLACK = 0.02
# Weights of the refinement's two aims, both as parts of 1: a full budget, and the time the other batches take.
FILL_WEIGHT, BALANCE_WEIGHT = 1.0, 1.0
_MAX_SKIPS = 8
_MAX_MOVES = 8
_MAX_SWAP_SIDES = 48
_PROBE_CONTEXT_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """PipeMax's estimate of a decode step on its slowest stage: alpha * sequences + beta * context tokens + delta."""

    sequence_seconds: float
    context_token_seconds: float
    constant_seconds: float

    @classmethod
    def of(cls, cost: CostModel, max_sequences: int) -> DecodeFit:
        """The straight line nearest to the cost model up to `max_sequences` sequences."""
        numbers = np.unique(np.linspace(1, max_sequences, 64).astype(np.int64))
        seconds = [bottleneck_seconds(cost, StepWork.decode(number, 0)) for number in numbers.tolist()]
        each, constant = np.polyfit(numbers, seconds, 1) if len(numbers) > 1 else (0.0, seconds[0])
        probe = StepWork.decode(max_sequences, _PROBE_CONTEXT_TOKENS)
        context = (bottleneck_seconds(cost, probe) - seconds[-1]) / _PROBE_CONTEXT_TOKENS
        return cls(float(each), context, float(constant))

    def seconds(self, num_sequences: IntArray | int, context_tokens: IntArray | int) -> FloatArray:
        return np.asarray(
            self.constant_seconds
            + self.sequence_seconds * np.asarray(num_sequences)
            + self.context_token_seconds * np.asarray(context_tokens)
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """N sequences whose KV is on the host alone, [N] each; `waited_turns` since they last ran."""

    context_tokens: IntArray
    blocks: IntArray
    waited_turns: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchGoal:
    """What the next batch should come to.

    limit_blocks: loads at most. max_sequences: loaded ones at most. num_resident, resident_context_tokens: sequences of
    the batch whose KV is on the device. target_seconds: what the other batches take; None in the warm-up, which takes
    short sequences first, since more sequences make longer steps, and longer steps make larger budgets.
    """

    fit: DecodeFit
    limit_blocks: int
    max_sequences: int
    num_resident: int
    resident_context_tokens: int
    target_seconds: float | None
    max_wait_turns: float

    def seconds(self, num_sequences: IntArray | int, context_tokens: IntArray | int) -> FloatArray:
        """Of the batch with this many sequences and context tokens loaded."""
        return self.fit.seconds(num_sequences + self.num_resident, context_tokens + self.resident_context_tokens)

    def objective(
        self, num_sequences: IntArray | int, context_tokens: IntArray | int, blocks: IntArray | int
    ) -> FloatArray:
        """PipeMax's lambda1 |Q_left| + lambda2 |T - T*|, relative to Q and T*; infinite where it is not allowed."""
        left = self.limit_blocks - np.asarray(blocks)
        value = FILL_WEIGHT * left / max(1, self.limit_blocks)
        if self.target_seconds is not None:
            seconds = self.seconds(num_sequences, context_tokens)
            value = value + BALANCE_WEIGHT * np.abs(seconds / self.target_seconds - 1)
        return np.where((left >= 0) & (np.asarray(num_sequences) <= self.max_sequences), value, np.inf)


def select_two_stage(candidates: Candidates, goal: PrefetchGoal) -> BoolArray:
    """[N]: which are loaded. Those that waited too long come first; they may exceed the target time."""
    overdue = candidates.waited_turns >= goal.max_wait_turns
    return refined(candidates, goal, greedy(candidates, goal, overdue), overdue)


def greedy(candidates: Candidates, goal: PrefetchGoal, overdue: BoolArray) -> BoolArray:
    """In order of preference, whatever still fits; a few that do not fit are passed over."""
    context, blocks = candidates.context_tokens, candidates.blocks
    preference = context if goal.target_seconds is None else np.abs(context - _ideal_context_tokens(candidates, goal))
    order = np.lexsort((preference, np.where(overdue, -candidates.waited_turns, 0)))
    longest_seconds = np.inf if goal.target_seconds is None else (1 + TIME_SLACK) * goal.target_seconds
    chosen = np.zeros(len(context), dtype=np.bool_)
    num_chosen, chosen_tokens, chosen_blocks = 0, 0, 0
    for _ in range(_MAX_SKIPS):
        numbers = num_chosen + np.arange(1, len(order) + 1)
        tokens = chosen_tokens + np.cumsum(context[order])
        sums = chosen_blocks + np.cumsum(blocks[order])
        fits = (sums <= goal.limit_blocks) & (numbers <= goal.max_sequences)
        fits &= overdue[order] | (goal.seconds(numbers, tokens) <= longest_seconds)
        num_fit = len(order) if fits.all() else int(np.argmin(fits))
        if num_fit:
            chosen[order[:num_fit]] = True
            num_chosen, chosen_tokens = int(numbers[num_fit - 1]), int(tokens[num_fit - 1])
            chosen_blocks = int(sums[num_fit - 1])
        order = order[num_fit + 1 :]
        if not len(order) or num_chosen >= goal.max_sequences:
            break
    return chosen


def refined(candidates: Candidates, goal: PrefetchGoal, chosen: BoolArray, overdue: BoolArray) -> BoolArray:
    """The best of adding one, dropping one or exchanging two, while that makes the objective smaller.

    Exchanges look at no more than some sequences of either side, spread over their contexts. Overdue ones stay.
    """
    context, blocks = candidates.context_tokens, candidates.blocks
    chosen = chosen.copy()
    by_context = np.argsort(context, kind="stable")
    for _ in range(_MAX_MOVES):
        number, tokens, total = int(chosen.sum()), int(context[chosen].sum()), int(blocks[chosen].sum())
        inside = _spread(by_context[(chosen & ~overdue)[by_context]])
        outside = _spread(by_context[~chosen[by_context]])
        # In row 0 none leaves; in column 0 none comes.
        leaving_tokens, coming_tokens = (np.concatenate([[0], context[side]]) for side in (inside, outside))
        leaving_blocks, coming_blocks = (np.concatenate([[0], blocks[side]]) for side in (inside, outside))
        numbers = number - (np.arange(len(leaving_tokens)) > 0)[:, None] + (np.arange(len(coming_tokens)) > 0)
        values = goal.objective(
            numbers,
            tokens - leaving_tokens[:, None] + coming_tokens,
            total - leaving_blocks[:, None] + coming_blocks,
        )
        leaves, comes = divmod(int(np.argmin(values)), len(coming_tokens))
        if values[leaves, comes] >= values[0, 0] - 1e-9:
            break
        if leaves:
            chosen[inside[leaves - 1]] = False
        if comes:
            chosen[outside[comes - 1]] = True
    return chosen


def _ideal_context_tokens(candidates: Candidates, goal: PrefetchGoal) -> float:
    """The mean context with which the loads fill both the budget and the time."""
    assert goal.target_seconds is not None
    if not len(candidates.blocks):
        return 0.0
    tokens = goal.limit_blocks * candidates.context_tokens.sum() / max(1, candidates.blocks.sum())
    left_seconds = goal.target_seconds - float(goal.fit.seconds(goal.num_resident, 0))
    left_seconds -= goal.fit.context_token_seconds * (tokens + goal.resident_context_tokens)
    return float(tokens / max(1.0, left_seconds / max(goal.fit.sequence_seconds, 1e-12)))


def _spread(indices: IntArray) -> IntArray:
    if len(indices) <= _MAX_SWAP_SIDES:
        return indices
    return indices[np.linspace(0, len(indices) - 1, _MAX_SWAP_SIDES).astype(np.int64)]
