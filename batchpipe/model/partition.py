"""Which layers a pipeline stage holds: contiguous runs, cut so that the slowest stage is as fast as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from batchpipe.errors import ModelError


def split_layers(layer_costs: Sequence[float], head_cost: float, embedding_cost: float, num_stages: int) -> list[range]:
    """One range of layers per stage, covering all in order; the largest stage cost is the smallest possible.

    The embedding counts to the first stage and the head to the last; any unit will do, if all three share it.
    Raises ModelError where there are fewer layers than stages.
    """
    num_layers = len(layer_costs)
    assert num_stages > 0
    if num_layers < num_stages:
        raise ModelError(
            f"engine.num_stages is {num_stages} and the model has {num_layers} layers; "
            f"every stage needs one, so ask for {num_layers} stages at most"
        )
    sums = list(accumulate(layer_costs, initial=embedding_cost))
    # best[end]: the largest cost of the stages so far, when they hold the layers before `end`.
    best = [cost + (head_cost if num_stages == 1 else 0.0) for cost in sums]
    starts_of_stage: list[list[int]] = []
    for stage in range(1, num_stages):
        extra = head_cost if stage == num_stages - 1 else 0.0
        starts = [0] * (num_layers + 1)
        extended = [float("inf")] * (num_layers + 1)
        for end in range(stage + 1, num_layers + 1):
            costs = {start: max(best[start], sums[end] - sums[start] + extra) for start in range(stage, end)}
            starts[end] = min(costs, key=lambda start: costs[start])
            extended[end] = costs[starts[end]]
        best = extended
        starts_of_stage.append(starts)
    cuts = [num_layers]
    for starts in reversed(starts_of_stage):
        cuts.append(starts[cuts[-1]])
    cuts = [0, *reversed(cuts)]
    return [range(start, end) for start, end in zip(cuts, cuts[1:], strict=False)]
