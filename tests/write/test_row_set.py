import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.types import Outcome, RowStatus
from batchpipe.write.row_set import RowCounts, RowSet, from_ranges, summarize, to_ranges
from batchpipe.write.schema import to_batch
from tests.write.completion_cases import SCHEMA, outcomes_of, sample


@given(st.lists(st.sets(st.integers(0, 100_000), max_size=30), max_size=8))
def test_holds_what_was_added_and_refuses_a_second_time(groups: list[set[int]]) -> None:
    rows = RowSet()
    expected: set[int] = set()
    for group in groups:
        indexes = np.array(sorted(group), dtype=np.int64)
        assert rows.overlaps(indexes) == bool(expected & group)
        if expected & group:
            with pytest.raises(AssertionError, match="given an outcome twice"):
                rows.add(indexes)
        else:
            rows.add(indexes)
            expected |= group
        assert len(rows) == len(expected)
    assert all(index in rows for index in expected)
    assert not any(index + 1 in rows for index in expected if index + 1 not in expected)


def test_a_row_twice_in_one_call_is_refused() -> None:
    with pytest.raises(AssertionError, match="twice"):
        RowSet().add(np.array([4, 4]))


@given(st.sets(st.integers(0, 500)))
def test_ranges_give_back_the_rows(rows: set[int]) -> None:
    indexes = np.array(list(rows), dtype=np.int64)
    ranges = to_ranges(indexes)
    assert from_ranges(ranges).tolist() == sorted(rows)
    assert all(after[0] > before[1] + 1 for before, after in zip(ranges, ranges[1:], strict=False))


def test_a_row_is_counted_once_and_by_its_worst_sample() -> None:
    statuses = [
        (RowStatus.SUCCEEDED, RowStatus.SUCCEEDED),
        (RowStatus.SUCCEEDED, RowStatus.FAILED),
        (RowStatus.CANCELED, RowStatus.SUCCEEDED),
        (RowStatus.CANCELED, RowStatus.FAILED),
    ]
    outcomes = [
        Outcome(outcome.key, 5, None, tuple(map(sample, pair)))
        for outcome, pair in zip(outcomes_of(range(4)), statuses, strict=True)
    ]
    rows, counts = summarize(to_batch(outcomes, SCHEMA))
    assert rows.tolist() == [0, 1, 2, 3]
    assert counts == RowCounts(1, 2, 1, {"empty_prompt": 2}, prompt_tokens=20, completion_tokens=12)
    assert counts.total == 4


def test_counts_add_up() -> None:
    one, other = RowCounts(1, 2, 0, {"a": 1, "b": 1}, 5, 6), RowCounts(3, 1, 1, {"b": 1}, 1, 2)
    assert one + other == RowCounts(4, 3, 1, {"a": 1, "b": 2}, 6, 8)
