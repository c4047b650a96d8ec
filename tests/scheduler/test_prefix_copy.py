"""Which sequence lends the KV of a common beginning, and how much of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.scheduler.intake import Intake
from batchpipe.scheduler.prefix_copy import MIN_COPIED_TOKENS, PrefixCopies, common_length
from batchpipe.scheduler.sequence import SequenceState
from tests.scheduler.scheduler_cases import request

NUM_PROMPT = 40


def sequence(num_common: int, *, num_scheduled: int = 0, num_prompt: int = NUM_PROMPT) -> SequenceState:
    """Its prompt has the first `num_common` tokens of the whole numbers, then others."""
    prompt = np.arange(num_prompt, dtype=np.int32)
    prompt[num_common:] += 1000
    intake = Intake(frozenset(), lambda seed, row_id, sample: 0, lambda params: None)
    (made,) = intake.sequences_of(replace(request(0, 1), prompt_token_ids=prompt))
    made.num_scheduled = num_scheduled
    return made


def test_nothing_is_lent_before_a_prompt_was_computed() -> None:
    assert PrefixCopies().take(sequence(NUM_PROMPT)) is None


@pytest.mark.parametrize("num_common", [MIN_COPIED_TOKENS, 20, NUM_PROMPT - 1])
def test_the_beginning_that_both_have_is_lent(num_common: int) -> None:
    copies, donor = PrefixCopies(), sequence(NUM_PROMPT)
    copies.learn(donor)
    assert copies.take(sequence(num_common)) == (donor, num_common)


def test_too_short_a_beginning_is_computed_anew() -> None:
    copies = PrefixCopies()
    copies.learn(sequence(NUM_PROMPT))
    assert copies.take(sequence(MIN_COPIED_TOKENS - 1)) is None


def test_tokens_that_have_kv_do_not_count() -> None:
    """As those of shared blocks; a copy must bring `MIN_COPIED_TOKENS` beyond them."""
    copies, donor = PrefixCopies(), sequence(NUM_PROMPT)
    copies.learn(donor)
    assert copies.take(sequence(20, num_scheduled=20 - MIN_COPIED_TOKENS)) == (donor, 20)
    assert copies.take(sequence(20, num_scheduled=20 - MIN_COPIED_TOKENS + 1)) is None


def test_the_last_token_is_always_computed() -> None:
    copies, donor = PrefixCopies(), sequence(NUM_PROMPT)
    copies.learn(donor)
    assert copies.take(sequence(NUM_PROMPT)) == (donor, NUM_PROMPT - 1)
    assert copies.take(sequence(20, num_prompt=20)) == (donor, 19)
    generated = sequence(20, num_prompt=20)  # preempted after two tokens of its own
    generated.num_tokens += 2
    assert copies.take(generated) == (donor, 20)


def test_the_latest_prompt_is_the_one_that_lends() -> None:
    copies, first, second = PrefixCopies(), sequence(NUM_PROMPT), sequence(20)
    copies.learn(first)
    copies.learn(second)
    assert copies.take(sequence(30)) == (second, 20)


def test_when_the_donor_leaves_the_oldest_running_one_lends_what_it_has_computed() -> None:
    copies, donor = PrefixCopies(), sequence(NUM_PROMPT)
    copies.learn(donor)
    oldest = sequence(NUM_PROMPT, num_scheduled=15)
    copies.forget(donor, [oldest, sequence(NUM_PROMPT, num_scheduled=30)])
    assert copies.take(sequence(NUM_PROMPT)) == (oldest, 15)
    copies.forget(oldest, [])
    assert copies.take(sequence(NUM_PROMPT)) is None


def test_what_the_next_donor_generated_is_not_lent() -> None:
    copies, donor = PrefixCopies(), sequence(NUM_PROMPT)
    copies.learn(donor)
    next_donor = sequence(20, num_prompt=20, num_scheduled=25)
    copies.forget(donor, [next_donor])
    assert copies.take(sequence(NUM_PROMPT)) == (next_donor, 20)


def test_others_may_leave_and_the_donor_stays() -> None:
    copies, donor, other = PrefixCopies(), sequence(NUM_PROMPT), sequence(NUM_PROMPT, num_scheduled=30)
    copies.learn(donor)
    copies.forget(other, [])
    assert copies.take(sequence(20)) == (donor, 20)


@given(first=st.lists(st.integers(0, 2), max_size=12), second=st.lists(st.integers(0, 2), max_size=12))
def test_the_common_length_is_that_of_the_longest_common_beginning(first: list[int], second: list[int]) -> None:
    length = common_length(np.array(first, np.int32), np.array(second, np.int32))
    assert first[:length] == second[:length]
    assert first[: length + 1] != second[: length + 1] or length == len(first) == len(second)
