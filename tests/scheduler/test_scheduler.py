"""The scheduler against a pipeline that would notice any wrong block table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.types import ErrorCode
from tests.scheduler.drive import drive, submit_steps
from tests.scheduler.scheduler_cases import capacity, expected, fake, request, scheduler_for


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=30),
    num_blocks=st.integers(8, 60),
    block_tokens=st.sampled_from([1, 3, 8]),
    max_batches=st.integers(1, 4),
    max_step_tokens=st.integers(8, 64),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    num_samples=st.integers(1, 3),
    num_shared=st.sampled_from([0, 9, 25]),
    max_prefills_ahead=st.sampled_from([0, 3]),
    runs_ahead=st.booleans(),
)
def test_every_row_ends_once_with_its_own_text(
    lengths: list[tuple[int, int]],
    num_blocks: int,
    block_tokens: int,
    max_batches: int,
    max_step_tokens: int,
    schedule: str,
    num_samples: int,
    num_shared: int,
    max_prefills_ahead: int,
    runs_ahead: bool,
) -> None:
    if runs_ahead:  # on one stage
        max_batches, max_prefills_ahead = 1, 0
    offered = capacity(
        num_blocks=num_blocks, block_tokens=block_tokens, max_batches=max_batches, max_step_tokens=max_step_tokens,
        max_prefills_ahead=max_prefills_ahead, runs_ahead=runs_ahead,
    )  # fmt: skip
    requests = [request(i, p, num_shared=num_shared, max_tokens=m, n=num_samples) for i, (p, m) in enumerate(lengths)]
    pipeline, scheduler = fake(offered), scheduler_for(offered, schedule)
    finished = drive(scheduler, pipeline, requests)
    assert sorted(f.request.key.index for f in finished) == list(range(len(requests)))
    assert scheduler.ledger.num_used == 0
    num_kv_tokens = num_blocks * block_tokens
    for end in finished:
        whole = expected(end.request, pipeline)
        # The last token's KV is never needed.
        fits = len(end.request.prompt_token_ids) + len(whole.token_ids) - 1 <= num_kv_tokens
        for completion in end.completions:
            if fits:
                assert completion == whole
            else:
                assert completion.error_code is ErrorCode.KV_CAPACITY
                assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]


def test_memory_short_by_half_preempts_and_loses_nothing() -> None:
    offered = capacity(num_blocks=24, max_batches=2)
    requests = [request(i, 10, max_tokens=30, ignore_eos=True) for i in range(12)]
    pipeline, scheduler = fake(offered), scheduler_for(offered)
    finished = drive(scheduler, pipeline, requests)
    assert scheduler.num_preemptions > 0
    assert scheduler.num_recomputed_tokens > 0
    assert all(end.completions == (expected(end.request, pipeline),) for end in finished)
    assert len(finished) == 12


def test_a_common_beginning_is_computed_once_and_shared() -> None:
    offered = capacity(num_blocks=400, max_batches=2)
    requests = [request(i, 30 + i % 5, num_shared=21, max_tokens=3) for i in range(40)]
    pipeline, scheduler = fake(offered), scheduler_for(offered)
    finished = drive(scheduler, pipeline, requests)
    assert all(end.completions == (expected(end.request, pipeline),) for end in finished)
    assert scheduler.num_reused_tokens == 20 * 39  # five whole blocks, of all but the first


@pytest.mark.parametrize("after_steps", [1, 3, 9])
def test_a_restarted_pipeline_continues_with_the_same_texts(after_steps: int) -> None:
    offered = capacity(max_batches=3)
    requests = [request(i, 5 + i, max_tokens=12) for i in range(20)]
    pipeline, scheduler = fake(offered), scheduler_for(offered)
    scheduler.add(requests)
    for _ in range(after_steps):
        submit_steps(scheduler, pipeline)
        scheduler.record(pipeline.collect())
    pipeline.restart()
    scheduler.requeue_all()
    finished = scheduler.take_finished() + drive(scheduler, pipeline, [])
    assert sorted(end.request.key.index for end in finished) == list(range(20))
    assert all(end.completions == (expected(end.request, pipeline),) for end in finished)


def test_a_prompt_that_can_never_fit_fails_and_the_next_goes_on() -> None:
    offered = capacity(num_blocks=4)
    finished = drive(scheduler_for(offered), fake(offered), [request(0, 17), request(1, 3, max_tokens=2)])
    by_index = {end.request.key.index: end.completions[0] for end in finished}
    assert by_index[0].error_code is ErrorCode.KV_CAPACITY
    assert "engine.kv_device_memory" in (by_index[0].error_message or "")
    assert by_index[1].error_code is None


def test_logits_that_are_not_finite_fail_their_row_only() -> None:
    offered = capacity()
    scheduler = scheduler_for(offered)
    pipeline = fake(offered)
    scheduler.add([request(0, 3, max_tokens=5, ignore_eos=True), request(1, 3, max_tokens=5, ignore_eos=True)])
    step = scheduler.next_step()
    assert step is not None
    pipeline.submit(step)
    result = pipeline.collect()
    result.token_ids[0] = -1
    scheduler.record(result)
    finished = scheduler.take_finished() + drive(scheduler, pipeline, [])
    codes = {end.request.key.index: end.completions[0].error_code for end in finished}
    assert codes == {0: ErrorCode.INVALID_LOGITS, 1: None}


def test_separate_never_mixes_prefills_and_decodes() -> None:
    offered = capacity(num_blocks=200)
    scheduler, pipeline = scheduler_for(offered, "separate"), fake(offered)
    scheduler.add([request(i, 6, max_tokens=4, ignore_eos=True) for i in range(20)])
    while not scheduler.idle:
        (step,) = submit_steps(scheduler, pipeline)
        assert len(set(step.context_lengths >= 6)) == 1
        scheduler.record(pipeline.collect())


def test_circulating_batches_hold_the_same_number() -> None:
    offered = capacity(num_blocks=200, max_batches=4, max_batch_sequences=32)
    scheduler, pipeline = scheduler_for(offered, "separate"), fake(offered)
    scheduler.add([request(i, 4, max_tokens=9, ignore_eos=True) for i in range(32)])
    sizes = []
    while not scheduler.idle:
        steps = submit_steps(scheduler, pipeline)
        sizes += [len(step.sequence_ids) for step in steps if (step.query_lengths == 1).all()]
        scheduler.record(pipeline.collect())
    assert set(sizes) == {8}
