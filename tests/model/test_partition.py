from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.errors import ModelError
from batchpipe.model.partition import split_layers

costs = st.floats(0.0, 100.0)


def largest_cost(ranges: list[range], layers: list[float], head: float, embedding: float) -> float:
    stages = [sum(layers[layer] for layer in stage) for stage in ranges]
    stages[0] += embedding
    stages[-1] += head
    return max(stages)


@given(st.lists(costs, min_size=1, max_size=8), costs, costs, st.integers(1, 8))
def test_no_other_split_has_a_faster_slowest_stage(
    layers: list[float], head: float, embedding: float, num_stages: int
) -> None:
    num_stages = min(num_stages, len(layers))
    ranges = split_layers(layers, head, embedding, num_stages)
    assert [layer for stage in ranges for layer in stage] == list(range(len(layers)))
    assert len(ranges) == num_stages and all(ranges)
    splits = [
        [range(start, end) for start, end in zip((0, *cuts), (*cuts, len(layers)), strict=True)]
        for cuts in combinations(range(1, len(layers)), num_stages - 1)
    ]
    best = min(largest_cost(split, layers, head, embedding) for split in splits)
    assert largest_cost(ranges, layers, head, embedding) == pytest.approx(best)


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert split_layers([1.0] * 12, 4.0, 0.0, 2) == [range(8), range(8, 12)]


def test_the_embedding_takes_layers_off_the_first_stage() -> None:
    assert split_layers([1.0] * 12, 0.0, 4.0, 2) == [range(4), range(4, 12)]


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(ModelError, match=r"engine\.num_stages is 5 and the model has 4 layers"):
        split_layers([1.0] * 4, 1.0, 0.0, 5)
