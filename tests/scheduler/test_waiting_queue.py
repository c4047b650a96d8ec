"""Waiting sequences: prompts that begin alike are admitted together, and no group waits for ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.scheduler.intake import Intake
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.waiting_queue import GROUP_TOKENS, WaitingQueue
from batchpipe.types import Request
from tests.scheduler.drive import submit_steps
from tests.scheduler.scheduler_cases import capacity, fake, request, scheduler_for


def request_of(index: int, beginning: int, num_prompt: int = GROUP_TOKENS + 6) -> Request:
    """Prompts with the same number of a beginning differ in their last two tokens alone."""
    prompt = np.full(num_prompt, beginning, np.int32)
    prompt[-2:] = index % 90, 7
    return replace(request(index, 1, max_tokens=2), prompt_token_ids=prompt)


def sequence(index: int, beginning: int, num_prompt: int = GROUP_TOKENS + 6) -> SequenceState:
    intake = Intake(frozenset(), lambda seed, row_id, sample: 0, lambda params: None)
    (made,) = intake.sequences_of(request_of(index, beginning, num_prompt))
    return made


def indices(queue: WaitingQueue) -> list[int]:
    return [waiting.group.request.key.index for waiting in queue]


def filled(*beginnings: int, num_prompt: int = GROUP_TOKENS + 6) -> WaitingQueue:
    queue = WaitingQueue()
    for index, beginning in enumerate(beginnings):
        queue.append(sequence(index, beginning, num_prompt))
    return queue


def test_prompts_that_begin_alike_stand_where_the_first_of_them_came() -> None:
    queue = filled(1, 2, 1, 3, 2, 1)
    assert indices(queue) == [0, 2, 5, 1, 4, 3]
    assert len(queue) == 6
    assert queue.first is next(iter(queue))


def test_short_prompts_stand_in_order_of_arrival() -> None:
    assert indices(filled(1, 2, 1, 2, num_prompt=GROUP_TOKENS)) == [0, 1, 2, 3]
    assert indices(filled(1, 2, 1, 2, num_prompt=GROUP_TOKENS + 2)) == [0, 2, 1, 3]


def test_one_token_makes_another_beginning() -> None:
    queue = filled(1, 2, 1)
    other = sequence(3, 1)
    other.prompt[GROUP_TOKENS - 1] = 50
    queue.append(other)
    last = sequence(4, 1)
    last.prompt[GROUP_TOKENS] = 50
    queue.append(last)
    assert indices(queue) == [0, 2, 4, 1, 3]


def test_a_group_takes_no_more_in_once_one_of_it_was_admitted() -> None:
    """Else rows that keep coming with one beginning would hold up all others."""
    queue = filled(1, 2, 1)
    assert queue.pop().group.request.key.index == 0
    queue.append(sequence(3, 1))
    queue.append(sequence(4, 1))
    queue.append(sequence(5, 2))
    assert indices(queue) == [2, 1, 5, 3, 4]


def test_a_short_prompt_that_is_admitted_closes_no_group() -> None:
    queue = WaitingQueue()
    short, same_tokens = sequence(0, 1, num_prompt=GROUP_TOKENS), sequence(1, 1)
    same_tokens.prompt[:GROUP_TOKENS] = short.prompt
    for one in (short, same_tokens, sequence(2, 2)):
        queue.append(one)
    assert queue.pop() is short
    late = sequence(3, 1)
    late.prompt[:GROUP_TOKENS] = short.prompt
    queue.append(late)
    assert indices(queue) == [1, 3, 2]


def test_preempted_sequences_come_first_and_belong_to_no_group() -> None:
    queue = filled(1, 1, 2)
    older, newer = queue.pop(), queue.pop()
    queue.put_back(newer)
    queue.put_back(older)
    assert indices(queue) == [0, 1, 2]
    queue.append(sequence(3, 1))
    queue.append(sequence(4, 2))
    assert indices(queue) == [0, 1, 2, 4, 3]


def test_a_preempted_sequence_that_is_admitted_again_closes_no_group() -> None:
    queue = filled(1)
    preempted = queue.pop()
    queue.append(sequence(1, 1))
    queue.put_back(preempted)
    queue.append(sequence(2, 2))
    assert queue.pop() is preempted
    queue.append(sequence(3, 1))
    assert indices(queue) == [1, 3, 2]


@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 3), st.sampled_from([3, GROUP_TOKENS + 6])), st.sampled_from(["pop", "back"])
        ),
        max_size=40,
    )
)
def test_each_sequence_comes_once_in_the_order_that_is_shown(events: list[tuple[int, int] | str]) -> None:
    queue = WaitingQueue()
    inside: set[int] = set()
    admitted: list[SequenceState] = []
    for number, event in enumerate(events):
        if isinstance(event, tuple):
            queue.append(sequence(number, *event))
            inside.add(number)
        elif event == "pop" and len(queue):
            shown, first = indices(queue), queue.first
            admitted.append(queue.pop())
            assert admitted[-1] is first
            assert indices(queue) == shown[1:]
            inside.remove(shown[0])
        elif event == "back" and admitted:
            shown, back = indices(queue), admitted.pop()
            queue.put_back(back)
            inside.add(back.group.request.key.index)
            assert indices(queue) == [back.group.request.key.index, *shown]
        assert len(queue) == len(inside)
        assert bool(queue) == bool(inside)
        assert sorted(indices(queue)) == sorted(inside)


def test_rows_that_begin_alike_are_admitted_together_and_share_their_beginning() -> None:
    offered = capacity(num_blocks=40, max_step_tokens=80)  # room for two prompts
    scheduler, pipeline = scheduler_for(offered), fake(offered)
    requests = [request_of(index, index % 2) for index in range(8)]
    scheduler.add(requests)
    admitted = []
    while not scheduler.idle:
        steps = submit_steps(scheduler, pipeline)
        admitted += [int(start.prompt_token_ids[0]) for step in steps for start in step.started]
        scheduler.record(pipeline.collect())
    assert admitted == [0] * 4 + [1] * 4
    assert scheduler.num_reused_tokens >= 6 * GROUP_TOKENS  # all but the first of either beginning
