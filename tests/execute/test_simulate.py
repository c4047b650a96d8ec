"""The pipeline without a model: its clock by hand, its promises as those of any pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.execute.simulate import SimulatedPipeline, SimulatedStages, StepKind
from batchpipe.plan.cost import StepWork
from batchpipe.plan.planner import Planner
from batchpipe.plan.schedules import SCHEDULES
from batchpipe.sample.rng import stream_of
from batchpipe.simulate import simulate
from batchpipe.types import (
    Capacity,
    Carried,
    ErrorCode,
    FinishedRequest,
    FinishReason,
    Request,
    RowKey,
    SamplingParams,
    SequenceStart,
    Step,
)

EOS = 5
NOTHING = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))
SAMPLING = SamplingParams(
    max_tokens=1000, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, logit_bias={}, stop=(), stop_token_ids=(), ignore_eos=False, min_tokens=0, n=1, seed=0,
    logprobs=0,
)  # fmt: skip


@dataclass(frozen=True)
class TokenCost:
    """So many seconds a token on each stage; whole numbers and powers of two, so that sums are exact."""

    seconds_per_token: tuple[float, ...]
    handoff: float = 0.0
    control_seconds: float = 0.0

    @property
    def num_stages(self) -> int:
        return len(self.seconds_per_token)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        return self.seconds_per_token[stage] * work.num_tokens

    def handoff_seconds(self, num_tokens: int) -> float:
        return self.handoff


def capacity(num_stages: int = 1, **changes: int) -> Capacity:
    values = {
        "num_blocks": 100, "block_tokens": 4, "num_stages": num_stages, "max_batches": num_stages,
        "max_step_tokens": 64, "max_batch_sequences": 8,
    }  # fmt: skip
    return Capacity(**(values | changes))


def cases(lengths: list[tuple[int, int]], num_samples: int = 1) -> tuple[list[Request], dict[int, int]]:
    """Requests of (prompt tokens, completion tokens), and lengths by stream; every further sample is a token longer."""
    requests, by_stream = [], {}
    for index, (num_prompt, length) in enumerate(lengths):
        prompt = np.full(num_prompt, 10 + index, dtype=np.int32)
        key = RowKey(index, str(index), Carried(NOTHING, 0))
        requests.append(Request(key, prompt, replace(SAMPLING, n=num_samples)))
        for sample in range(num_samples):
            by_stream[stream_of(0, str(index), sample)] = length + sample
    return requests, by_stream


def step_of(step_id: int, num_tokens: int, num_context: int = 0, *, starts: bool = True) -> Step:
    """A step of one sequence, whose number and stream are the step's."""
    start = SequenceStart(step_id, step_id, SAMPLING, np.zeros(num_tokens, np.int32), ())
    return Step(
        step_id=step_id,
        sequence_ids=(step_id,),
        query_lengths=np.array([num_tokens], np.int32),
        context_lengths=np.array([num_context], np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        samples=np.array([True]),
        copied_blocks=np.zeros((0, 2), np.int32),
        started=(start,) if starts else (),
    )


def pipeline_of(cost: TokenCost, **changes: int) -> SimulatedPipeline:
    return SimulatedPipeline(capacity(cost.num_stages, **changes), cost, dict.fromkeys(range(1000), 50), EOS)


def drive(planner: Planner, pipeline: SimulatedPipeline, requests: list[Request]) -> list[FinishedRequest]:
    planner.add(requests)
    finished: list[FinishedRequest] = []
    while not planner.idle:
        while planner.num_in_flight < pipeline.capacity.max_batches and (step := planner.next_step()):
            pipeline.submit(step)
        if planner.num_in_flight:
            assert pipeline.ready()
            planner.record(pipeline.collect())
        planner.check_integrity()
        finished += planner.take_finished()
    return finished


def planner_for(pipeline: SimulatedPipeline, schedule: str) -> Planner:
    return Planner(pipeline.capacity, schedule, frozenset({EOS}), stream_of, lambda params: None, cost=pipeline.cost)


def test_one_stage_by_hand() -> None:
    pipeline = pipeline_of(TokenCost((0.5,), control_seconds=0.25))
    pipeline.submit(step_of(0, 4))
    assert pipeline.stages.now_seconds == 0.0
    assert pipeline.collect().stage_seconds == (2.0,)
    assert pipeline.stages.now_seconds == 2.0
    pipeline.submit(step_of(0, 1, 4, starts=False))
    pipeline.collect()
    assert pipeline.stages.now_seconds == 2.75
    assert [(step.kind, step.start_seconds, step.end_seconds, step.num_tokens) for step in pipeline.steps] == [
        (StepKind.PREFILL, 0.0, 2.0, 4),
        (StepKind.DECODE, 2.25, 2.75, 1),
    ]
    assert pipeline.stages.idle_seconds == (0.25,)


def test_three_stages_by_hand() -> None:
    pipeline = pipeline_of(TokenCost((1.0, 2.0, 1.0), handoff=0.5))
    pipeline.submit(step_of(0, 2))  # 0 to 2, 2.5 to 6.5, 7 to 9
    pipeline.submit(step_of(1, 1))  # 2 to 3, 6.5 to 8.5 behind the other step, 9 to 10
    assert pipeline.collect().stage_seconds == (2.0, 4.0, 2.0)
    assert pipeline.stages.now_seconds == 9.0
    pipeline.collect()
    assert pipeline.stages.now_seconds == 10.0
    assert pipeline.stages.busy_seconds == (3.0, 6.0, 3.0)
    assert pipeline.stages.idle_seconds == (7.0, 4.0, 7.0)


@pytest.mark.parametrize(
    ("stage_seconds", "num_in_flight", "seconds"),
    [
        ((1.0, 1.0, 1.0), 1, 90.0),  # one batch walks alone
        ((1.0, 1.0, 1.0), 3, 32.0),  # a step a second once the last stage is reached
        ((1.0, 4.0, 1.0), 3, 122.0),  # the slow stage never waits
        ((1.0, 4.0, 1.0), 1, 180.0),
    ],
)
def test_steps_in_flight_overlap_up_to_the_slowest_stage(
    stage_seconds: tuple[float, ...], num_in_flight: int, seconds: float
) -> None:
    pipeline = pipeline_of(TokenCost(stage_seconds))
    for sequence in range(num_in_flight):
        pipeline.submit(step_of(sequence, 1))
    for number in range(num_in_flight, 30):
        result = pipeline.collect()
        assert result.step_id == number % num_in_flight
        pipeline.submit(step_of(result.step_id, 1, 1, starts=False))
    while pipeline.ready():
        pipeline.collect()
    assert pipeline.stages.now_seconds == seconds
    assert pipeline.stages.busy_seconds == tuple(30 * each for each in stage_seconds)


def test_pipelines_that_share_stages_take_turns() -> None:
    cost, stages = TokenCost((1.0, 1.0)), SimulatedStages(2)
    first, second = (SimulatedPipeline(capacity(2), cost, {0: 9, 1: 9}, EOS, stages=stages) for _ in range(2))
    first.submit(step_of(0, 4))  # 0 to 4, 4 to 8
    second.submit(step_of(1, 1))  # 4 to 5, 8 to 9
    assert first.ready()
    assert not second.ready()
    first.collect()
    assert second.ready()
    second.collect()
    assert stages.now_seconds == 9.0
    assert stages.busy_seconds == (5.0, 5.0)


@settings(max_examples=60, deadline=None)
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
    pipeline = SimulatedPipeline(offered, TokenCost((1.0,) * num_stages), by_stream, EOS)
    planner = planner_for(pipeline, schedule)
    finished = drive(planner, pipeline, requests)
    assert sorted(end.request.key.index for end in finished) == list(range(len(requests)))
    assert planner.ledger.num_used == 0
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
    pipeline = SimulatedPipeline(capacity(2, num_blocks=24), TokenCost((1.0, 1.0)), by_stream, EOS)
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
        pipeline = SimulatedPipeline(capacity(3), TokenCost((1.0,) * 3), by_stream, EOS, noise=noise, seed=seed)
        return simulate([pipeline], requests, "hybrid").seconds

    assert run_of(0.2, 1) == run_of(0.2, 1)
    assert run_of(0.2, 1) != run_of(0.2, 2)
    assert run_of(0.0, 1) == run_of(0.0, 2)


def test_noise_leaves_the_mean_as_it_is() -> None:
    noisy = SimulatedPipeline(capacity(), TokenCost((1.0,)), dict.fromkeys(range(4000), 9), EOS, noise=0.5, seed=3)
    for step_id in range(4000):
        noisy.submit(step_of(step_id, 1))
        noisy.collect()
    assert noisy.stages.busy_seconds[0] == pytest.approx(4000, rel=0.03)


def test_requests_are_known_only_once_they_arrive() -> None:
    requests, by_stream = cases([(4, 3), (4, 3), (4, 3)])
    pipeline = SimulatedPipeline(capacity(), TokenCost((1.0,)), by_stream, EOS)
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
    pipelines = [SimulatedPipeline(offered, TokenCost((1.0, 1.0)), by_stream, EOS, stages=stages) for _ in range(2)]
    run = simulate(pipelines, requests, "separate")
    assert run.output_tokens == sum(by_stream.values())
    ends = sorted(step.end_seconds for pipeline in pipelines for step in pipeline.steps)
    assert ends[-1] == run.seconds
    assert all(pipeline.steps for pipeline in pipelines)


def test_a_restarted_pipeline_ends_every_request_at_its_length() -> None:
    requests, by_stream = cases([(5 + i, 12) for i in range(20)])
    pipeline = SimulatedPipeline(capacity(3), TokenCost((1.0,) * 3), by_stream, EOS)
    planner = planner_for(pipeline, "hybrid")
    planner.add(requests)
    for _ in range(5):
        while planner.num_in_flight < 3 and (step := planner.next_step()):
            pipeline.submit(step)
        planner.record(pipeline.collect())
    pipeline.restart()
    assert not pipeline.ready()
    planner.requeue_all()
    finished = planner.take_finished() + drive(planner, pipeline, [])
    assert sorted(end.request.key.index for end in finished) == list(range(20))
    assert all(len(end.completions[0].token_ids) == 12 for end in finished)


def test_a_request_that_never_fits_is_counted_as_failed() -> None:
    requests, by_stream = cases([(17, 5), (3, 2)])
    pipeline = SimulatedPipeline(capacity(num_blocks=4), TokenCost((1.0,)), by_stream, EOS)
    run = simulate([pipeline], requests, "hybrid")
    assert (run.num_failed, run.num_requests, run.output_tokens) == (1, 2, 2)


def test_what_breaks_the_port_is_noticed() -> None:
    pipeline = pipeline_of(TokenCost((1.0,)))
    pipeline.submit(step_of(0, 1))
    with pytest.raises(AssertionError, match="more steps in flight"):
        pipeline.submit(step_of(1, 1))
    pipeline.collect()
    pipeline.submit(step_of(2, 1, starts=False))
    with pytest.raises(AssertionError, match="stranger"):
        pipeline.collect()


def test_an_end_token_of_zero_is_drawn_at_the_end_only() -> None:
    pipeline = SimulatedPipeline(capacity(), TokenCost((1.0,)), {0: 2}, 0)
    pipeline.submit(step_of(0, 3))
    assert pipeline.collect().token_ids.tolist() == [1]
    pipeline.submit(step_of(0, 1, 3, starts=False))
    assert pipeline.collect().token_ids.tolist() == [0]
