"""The clock of the pipeline without a model, by hand."""

from __future__ import annotations

import pytest

from batchpipe.pipeline.simulated import SimulatedPipeline, SimulatedStages, StepKind
from tests.pipeline.simulated_cases import EOS, capacity, idle_seconds, pipeline_of, step_of, token_cost


def test_one_stage_by_hand() -> None:
    pipeline = pipeline_of(token_cost((0.5,), control_seconds=0.25))
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
    assert idle_seconds(pipeline) == (0.25,)


def test_three_stages_by_hand() -> None:
    pipeline = pipeline_of(token_cost((1.0, 2.0, 1.0), fixed_handoff_seconds=0.5))
    pipeline.submit(step_of(0, 2))  # 0 to 2, 2.5 to 6.5, 7 to 9
    pipeline.submit(step_of(1, 1))  # 2 to 3, 6.5 to 8.5 behind the other step, 9 to 10
    assert pipeline.collect().stage_seconds == (2.0, 4.0, 2.0)
    assert pipeline.stages.now_seconds == 9.0
    pipeline.collect()
    assert pipeline.stages.now_seconds == 10.0
    assert pipeline.stages.busy_seconds == (3.0, 6.0, 3.0)
    assert idle_seconds(pipeline) == (7.0, 4.0, 7.0)


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
    pipeline = pipeline_of(token_cost(stage_seconds))
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
    cost, stages = token_cost((1.0, 1.0)), SimulatedStages(2)
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


def test_noise_leaves_the_mean_as_it_is() -> None:
    noisy = SimulatedPipeline(capacity(), token_cost((1.0,)), dict.fromkeys(range(4000), 9), EOS, noise=0.5, seed=3)
    for step_id in range(4000):
        noisy.submit(step_of(step_id, 1))
        noisy.collect()
    assert noisy.stages.busy_seconds[0] == pytest.approx(4000, rel=0.03)


def test_what_breaks_the_port_is_noticed() -> None:
    pipeline = pipeline_of(token_cost((1.0,)))
    pipeline.submit(step_of(0, 1))
    with pytest.raises(AssertionError, match="more steps in flight"):
        pipeline.submit(step_of(1, 1))
    pipeline.collect()
    pipeline.submit(step_of(2, 1, starts=False))
    with pytest.raises(AssertionError, match="unknown sequence"):
        pipeline.collect()


def test_an_end_token_of_zero_is_drawn_at_the_end_only() -> None:
    pipeline = SimulatedPipeline(capacity(), token_cost((1.0,)), {0: 2}, 0)
    pipeline.submit(step_of(0, 3))
    assert pipeline.collect().token_ids.tolist() == [1]
    pipeline.submit(step_of(0, 1, 3, starts=False))
    assert pipeline.collect().token_ids.tolist() == [0]
