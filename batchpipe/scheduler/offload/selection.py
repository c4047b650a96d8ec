"""Which KV comes to the device for the next batch and which leaves it, where batches circulate over the stages.

While one of the circulating batches runs on a stage, the KV of the others lies idle there (PipeMax, arXiv 2605.02189).
All KV is copied to the host as it is made, so to evict is to release; what comes back is bounded by what the link
carries during a step. Everything here is in steps and in blocks, so it holds for every stage alike.

PipeMax brings the whole of a batch's missing KV in while the batch before it runs. Ours can also bring it in layer by
layer while the batch itself runs (Pie's swapping, arXiv 2411.09317, inside a stage): the KV then needs room for two
groups of layers, not for two batches, and every byte the link carries in a round is a byte of KV more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchpipe.predict.base import FloatArray
from batchpipe.scheduler.offload.decode_time import DecodeTime, IntArray
from batchpipe.types import BoolArray

# Batches' loads that stand on the device beside what stays there, where they come whole (`batch_capacity_blocks`).
BATCH_BUFFERS = 2.0
# Prompts are computed until this part of the host's room is taken.
HOST_WATERMARK = 0.9
# A batch may be predicted to take this part longer than the others, so that batches can grow.
TIME_SLACK = 0.02
# Weights of the refinement's two aims, both as parts of 1: a full budget, and the time the other batches take.
FILL_WEIGHT, BALANCE_WEIGHT = 1.0, 1.0
_MAX_SKIPS = 8
_MAX_MOVES = 8
_MAX_SWAP_SIDES = 48


def prefetch_budget_bytes(step_seconds: FloatArray | float, link_bytes_per_second: float) -> FloatArray:
    """What the link carries while the current step runs (PipeMax's sliding window)."""
    return np.asarray(step_seconds) * link_bytes_per_second


def batch_capacity_blocks(
    device_blocks: float, budget_blocks: FloatArray | float, num_batches: int, num_buffers: float
) -> FloatArray:
    """K, the KV of each of C batches when each loads Q blocks a step: (M + (C - B) Q) / C, and M / B at most.

    num_buffers: how much of a batch's loads the device holds beside what stays there: 2 where a whole batch is loaded
    while another runs; 2 / G where loads come in G groups of layers while the batch itself runs.
    """
    capacity = (device_blocks + (num_batches - num_buffers) * np.asarray(budget_blocks)) / num_batches
    return np.minimum(capacity, device_blocks / num_buffers)


def pipeline_capacity_tokens(
    device_bytes: Sequence[float],
    budget_bytes: Sequence[float],
    token_bytes: Sequence[int],
    num_batches: int,
    num_buffers: float,
) -> float:
    """Tokens of a batch that every stage has room for, each with a memory, a link and layers of its own, [S] each.

    A stage with less memory or more layers loads more of a batch than others do: a watermark for each stage.
    """
    stages = zip(device_bytes, budget_bytes, token_bytes, strict=True)
    return min(
        float(batch_capacity_blocks(room, budget, num_batches, num_buffers)) / each for room, budget, each in stages
    )


@dataclass(frozen=True, slots=True)
class Candidates:
    """N sequences whose KV is on the host alone, [N] each; `waited_steps` since they last ran."""

    context_tokens: IntArray
    blocks: IntArray
    waited_steps: IntArray


@dataclass(frozen=True, slots=True)
class Aim:
    """What the next batch should come to.

    limit_blocks: loads at most, by the link's budget and by the device's room. max_sequences: loaded ones at most.
    num_kept, kept_context_tokens: sequences of the batch whose KV is on the device. num_other_rows: prompt tokens of
    the step. target_seconds: what the other batches take; None in the warm-up, which takes short sequences first,
    since more sequences make longer steps, and longer steps larger budgets.
    """

    time: DecodeTime
    limit_blocks: int
    max_sequences: int
    num_kept: int
    kept_context_tokens: int
    num_other_rows: int
    target_seconds: float | None
    max_wait_steps: int

    def seconds(self, num_sequences: IntArray | int, context_tokens: IntArray | int) -> FloatArray:
        """Of the batch with so many sequences and tokens loaded."""
        num_rows = num_sequences + (self.num_kept + self.num_other_rows)
        return self.time.seconds(num_rows, context_tokens + self.kept_context_tokens)

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


def select(candidates: Candidates, aim: Aim) -> BoolArray:
    """[N]: who is loaded. Who waited too long comes first, so that nobody starves; it may exceed the target time."""
    overdue = candidates.waited_steps >= aim.max_wait_steps
    return refined(candidates, aim, greedy(candidates, aim, overdue), overdue)


def greedy(candidates: Candidates, aim: Aim, overdue: BoolArray) -> BoolArray:
    """In order of preference, whoever still fits; a few that do not fit are passed over."""
    context, blocks = candidates.context_tokens, candidates.blocks
    preference = context if aim.target_seconds is None else np.abs(context - _ideal_context_tokens(candidates, aim))
    order = np.lexsort((preference, np.where(overdue, -candidates.waited_steps, 0)))
    longest_seconds = np.inf if aim.target_seconds is None else (1 + TIME_SLACK) * aim.target_seconds
    chosen = np.zeros(len(context), dtype=np.bool_)
    num_chosen, chosen_tokens, chosen_blocks = 0, 0, 0
    for _ in range(_MAX_SKIPS):
        numbers = num_chosen + np.arange(1, len(order) + 1)
        tokens = chosen_tokens + np.cumsum(context[order])
        sums = chosen_blocks + np.cumsum(blocks[order])
        fits = (sums <= aim.limit_blocks) & (numbers <= aim.max_sequences)
        fits &= overdue[order] | (aim.seconds(numbers, tokens) <= longest_seconds)
        num_fit = len(order) if fits.all() else int(np.argmin(fits))
        if num_fit:
            chosen[order[:num_fit]] = True
            num_chosen, chosen_tokens = int(numbers[num_fit - 1]), int(tokens[num_fit - 1])
            chosen_blocks = int(sums[num_fit - 1])
        order = order[num_fit + 1 :]
        if not len(order) or num_chosen >= aim.max_sequences:
            break
    return chosen


def refined(candidates: Candidates, aim: Aim, chosen: BoolArray, overdue: BoolArray) -> BoolArray:
    """The best of adding one, dropping one or exchanging two, while that makes the objective smaller.

    Exchanges look at no more than some sequences of either side, spread over their contexts. Who is overdue stays.
    """
    context, blocks = candidates.context_tokens, candidates.blocks
    chosen = chosen.copy()
    by_context = np.argsort(context, kind="stable")
    for _ in range(_MAX_MOVES):
        number, tokens, total = int(chosen.sum()), int(context[chosen].sum()), int(blocks[chosen].sum())
        inside = _spread(by_context[(chosen & ~overdue)[by_context]])
        outside = _spread(by_context[~chosen[by_context]])
        # Row 0: nobody leaves; column 0: nobody comes.
        leaving_tokens, coming_tokens = (np.concatenate([[0], context[side]]) for side in (inside, outside))
        leaving_blocks, coming_blocks = (np.concatenate([[0], blocks[side]]) for side in (inside, outside))
        numbers = number - (np.arange(len(leaving_tokens)) > 0)[:, None] + (np.arange(len(coming_tokens)) > 0)
        values = aim.objective(
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


def evictions(blocks: IntArray, steps_to_next_use: IntArray, needed_blocks: int) -> IntArray:
    """Indices of who leaves so that so many blocks fall free: last used soonest after, then the largest (Belady)."""
    if needed_blocks <= 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((-blocks, -steps_to_next_use))
    return order[: int(np.searchsorted(np.cumsum(blocks[order]), needed_blocks)) + 1]


def prefills_next(prefilling: bool, live_blocks: int, prompt_blocks: int, device_blocks: int, host_blocks: int) -> bool:
    """PipeMax's phases: prompts until the host's watermark, then decodes until all that is left fits the device.

    live_blocks: of sequences that have KV; prompt_blocks: of the prompts that would come next.
    """
    if live_blocks + prompt_blocks > HOST_WATERMARK * host_blocks:
        return False
    return prefilling or live_blocks <= device_blocks


@dataclass(slots=True)
class StallFeedback:
    """Corrects the budget, a prediction, by the stall that was measured: proportional and integral, within bounds.

    The aim is not no stall at all: noise makes some steps stall with any budget, and a smaller one loses batch.
    """

    factor: float = 1.0
    _integral: float = 0.0

    TARGET_SHARE = 0.01
    PROPORTIONAL = 0.5
    INTEGRAL = 0.2
    LEAST, MOST = 0.1, 1.2

    def observe(self, stall_seconds: float, step_seconds: float) -> None:
        """The stall of a step beside the time it would have taken. A long stall counts as one of a whole step."""
        error = self.TARGET_SHARE - min(1.0, stall_seconds / step_seconds)
        # What is integrated stays within the factor's bounds, so it turns at once when the error does.
        self._integral = float(np.clip(self._integral + self.INTEGRAL * error, self.LEAST - 1, self.MOST - 1))
        factor = 1 + self._integral + self.PROPORTIONAL * error
        self.factor = float(np.clip(factor, self.LEAST, self.MOST))


def _ideal_context_tokens(candidates: Candidates, aim: Aim) -> float:
    """The mean context with which the loads fill both the budget and the time."""
    assert aim.target_seconds is not None
    if not len(candidates.blocks):
        return 0.0
    tokens = aim.limit_blocks * candidates.context_tokens.sum() / max(1, candidates.blocks.sum())
    row_seconds = aim.target_seconds - aim.time.context_token_seconds * (tokens + aim.kept_context_tokens)
    # Of the sizes that take this time, the largest.
    rows = int(np.searchsorted(aim.time.by_rows_seconds, row_seconds * (1 + 1e-9), side="right")) - 1
    return float(tokens / max(1, rows - aim.num_kept - aim.num_other_rows))


def _spread(indices: IntArray) -> IntArray:
    if len(indices) <= _MAX_SWAP_SIDES:
        return indices
    return indices[np.linspace(0, len(indices) - 1, _MAX_SWAP_SIDES).astype(np.int64)]
