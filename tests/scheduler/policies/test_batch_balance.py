"""The draw of a decode batch: right number, near its share of context, nobody left over twice in a row."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.scheduler.policies.batch_balance import balanced_selection
from batchpipe.scheduler.sequence import SequenceState
from tests.scheduler.policies.test_kv_forecast import sequence


def ready_of(contexts: list[int]) -> list[SequenceState]:
    return [sequence(index, context, 0, 0) for index, context in enumerate(contexts)]


@settings(max_examples=100)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 60))
def test_as_many_as_asked_for_and_no_further_from_the_share_than_the_first_in_line(
    contexts: list[int], num_decodes: int
) -> None:
    ready = ready_of(contexts)
    target = sum(contexts) * num_decodes / len(contexts)
    drawn = balanced_selection(ready, num_decodes, target)
    assert len(drawn) == len({one.sequence_id for one in drawn}) == min(num_decodes, len(ready))
    if num_decodes < len(ready):
        first = sum(one.num_tokens for one in ready[:num_decodes])
        assert abs(sum(one.num_tokens for one in drawn) - target) <= abs(first - target)


def test_a_heavy_batch_is_lightened() -> None:
    ready = ready_of([400] * 20 + [10] * 5)
    drawn = balanced_selection(ready, 20, 20 * 320)
    assert sum(one.num_tokens for one in drawn) == 16 * 400 + 4 * 10  # one more exchange would be too many


def test_who_was_left_over_is_drawn_the_next_time() -> None:
    ready = ready_of([10, 10, 500, 500, 500, 500, 500])
    drawn = balanced_selection(ready, 5, 100.0)
    left = [one for one in ready if one not in drawn]
    returned = left + drawn
    assert set(map(id, left)) <= set(map(id, balanced_selection(returned, 5, 100.0)))
