"""Whole runs on the pipeline without a model: its promises are those of any pipeline."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.cost.model import KvLink
from batchpipe.pipeline.simulated import SimulatedPipeline, SimulatedStages, StepKind
from batchpipe.runner.simulate import simulate
from batchpipe.sample.rng import stream_of
from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import ErrorCode, FinishReason
from tests.pipeline.simulated_cases import EOS, capacity, cases, token_cost
from tests.scheduler.drive import drive, submit_steps


def scheduler_for(pipeline: SimulatedPipeline, schedule: str) -> Scheduler:
    return Scheduler(pipeline.capacity, schedule, frozenset({EOS}), stream_of, lambda params: None, cost=pipeline.cost)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=30),
    num_blocks=st.integers(8, 60),
    num_stages=st.integers(1, 4),
    num_samples=st.integers(1, 2),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
def test_every_request_ends_once_at_its_length(
    lengths: list[tuple[int, int]], num_blocks: int, num_stages: int, num_samples: int, schedule: str
) -> None:
    requests, by_stream = cases(lengths, num_samples)
    offered = capacity(num_stages, num_blocks=num_blocks)
    pipeline = SimulatedPipeline(offered, token_cost((1.0,) * num_stages), by_stream, EOS)
    scheduler = scheduler_for(pipeline, schedule)
    finished = drive(scheduler, pipeline, requests)
    assert sorted(end.request.key.index for end in finished) == list(range(len(requests)))
    assert scheduler.ledger.num_used == 0
    for end in finished:
        num_prompt, length = lengths[end.request.key.index]
        for sample, completion in enumerate(end.completions):
            # The last token's KV is never needed.
            if num_prompt + length + sample - 1 <= num_blocks * offered.block_tokens:
                assert len(completion.token_ids) == length + sample
                assert completion.token_ids[-1] == EOS
                assert completion.finish_reason is FinishReason.STOP
                assert EOS not in completion.token_ids[:-1]
            else:
                assert completion.error_code is ErrorCode.KV_CAPACITY


def test_preempted_sequences_count_on_from_where_they_were() -> None:
    requests, by_stream = cases([(10, 30)] * 12)
    pipeline = SimulatedPipeline(capacity(2, num_blocks=24), token_cost((1.0, 1.0)), by_stream, EOS)
    run = simulate([pipeline], requests, "hybrid")
    assert run.num_preemptions > 0
    assert run.num_recomputed_tokens > 0
    assert run.output_tokens == 12 * 30
    assert run.prompt_tokens == 12 * 10
    # Each stage computes every prompt and all completions but their last tokens, and what was lost again.
    assert pipeline.stages.busy_seconds == (12.0 * (10 + 29) + run.num_recomputed_tokens,) * 2


def test_a_run_with_noise_repeats_with_its_seed_only() -> None:
    requests, by_stream = cases([(5 + i % 7, 10 + i % 11) for i in range(60)])

    def run_of(noise: float, seed: int) -> float:
        pipeline = SimulatedPipeline(capacity(3), token_cost((1.0,) * 3), by_stream, EOS, noise=noise, seed=seed)
        return simulate([pipeline], requests, "hybrid").seconds

    assert run_of(0.2, 1) == run_of(0.2, 1)
    assert run_of(0.2, 1) != run_of(0.2, 2)
    assert run_of(0.0, 1) == run_of(0.0, 2)


def test_requests_are_known_only_once_they_arrive() -> None:
    requests, by_stream = cases([(4, 3), (4, 3), (4, 3)])
    pipeline = SimulatedPipeline(capacity(), token_cost((1.0,)), by_stream, EOS)
    run = simulate([pipeline], requests, "hybrid", arrival_seconds=[0.0, 1.0, 100.0])
    # The second comes while the first's prompt is computed; the third finds everything idle.
    assert [(step.kind, step.start_seconds, step.num_tokens) for step in pipeline.steps] == [
        (StepKind.PREFILL, 0.0, 4),
        (StepKind.MIXED, 4.0, 5),
        (StepKind.DECODE, 9.0, 2),
        (StepKind.DECODE, 11.0, 1),
        (StepKind.PREFILL, 100.0, 4),
        (StepKind.DECODE, 104.0, 1),
        (StepKind.DECODE, 105.0, 1),
    ]
    assert run.seconds == 106.0
    assert run.stage_utilization == (18.0 / 106.0,)
    assert run.output_tokens_per_second == 9 / 106.0


def test_planners_of_their_own_on_shared_stages_lose_nothing() -> None:
    requests, by_stream = cases([(5 + i % 7, 10 + i % 11) for i in range(40)])
    stages = SimulatedStages(2)
    offered = capacity(2, max_batches=1, num_blocks=30)
    pipelines = [SimulatedPipeline(offered, token_cost((1.0, 1.0)), by_stream, EOS, stages=stages) for _ in range(2)]
    run = simulate(pipelines, requests, "separate")
    assert run.output_tokens == sum(by_stream.values())
    ends = sorted(step.end_seconds for pipeline in pipelines for step in pipeline.steps)
    assert ends[-1] == run.seconds
    assert all(pipeline.steps for pipeline in pipelines)


def test_a_restarted_pipeline_ends_every_request_at_its_length() -> None:
    requests, by_stream = cases([(5 + i, 12) for i in range(20)])
    pipeline = SimulatedPipeline(capacity(3), token_cost((1.0,) * 3), by_stream, EOS)
    scheduler = scheduler_for(pipeline, "hybrid")
    scheduler.add(requests)
    for _ in range(5):
        submit_steps(scheduler, pipeline)
        scheduler.record(pipeline.collect())
    pipeline.restart()
    assert not pipeline.ready()
    scheduler.requeue_all()
    finished = scheduler.take_finished() + drive(scheduler, pipeline, [])
    assert sorted(end.request.key.index for end in finished) == list(range(20))
    assert all(len(end.completions[0].token_ids) == 12 for end in finished)


def test_a_request_that_never_fits_is_counted_as_failed() -> None:
    requests, by_stream = cases([(17, 5), (3, 2)])
    pipeline = SimulatedPipeline(capacity(num_blocks=4), token_cost((1.0,)), by_stream, EOS)
    run = simulate([pipeline], requests, "hybrid")
    assert (run.num_failed, run.num_requests, run.output_tokens) == (1, 2, 2)


@pytest.mark.parametrize("offload", ["batch", "layer"])
def test_with_a_second_tier_every_row_computed_goes_to_the_host(offload: str) -> None:
    requests, by_stream = cases([(20 + i % 7, 40 + i % 31) for i in range(60)])
    link = KvLink(load_bytes_per_second=1e3, store_bytes_per_second=1e3, kv_bytes_per_token_layer=10, num_layers=4)
    offered = capacity(3, max_batches=4, num_host_blocks=900, streams_per_block=2, offload=offload)
    pipeline = SimulatedPipeline(offered, token_cost((1.0,) * 3, kv_links=(link,) * 3), by_stream, EOS)
    run = simulate([pipeline], requests, "temporal")
    assert run.num_failed == 0
    assert run.output_tokens == sum(by_stream.values())
    # The last token's KV is never needed.
    num_rows = run.prompt_tokens + run.output_tokens - len(requests) + run.num_recomputed_tokens
    assert run.stored_bytes == 3 * 40 * num_rows
    assert all(busy + stall <= 1.0 for busy, stall in zip(run.stage_utilization, run.stage_stall_shares, strict=True))
