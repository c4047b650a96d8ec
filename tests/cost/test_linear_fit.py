"""The straight line of decode steps, and the correction that a run learns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchpipe.cost.linear_fit import fit_decodes
from batchpipe.cost.model import CostModel, StepWork
from batchpipe.cost.online import OnlineCost
from batchpipe.types import LinkUse
from tests.cost.formula_cost import FormulaCost

ALPHA, BETA, DELTA = 2e-4, 3e-8, 5e-3


def random_decodes(random: np.random.Generator, num_steps: int) -> list[StepWork]:
    batches = random.integers(1, 256, num_steps)
    return [StepWork.decode(int(b), int(b * random.integers(20, 1500))) for b in batches]


def true_seconds(work: StepWork) -> float:
    return ALPHA * work.num_decodes + BETA * work.decode_context_tokens + DELTA


def test_a_fit_recovers_known_coefficients() -> None:
    works = random_decodes(np.random.default_rng(0), 50)
    fit = fit_decodes(works, [true_seconds(work) for work in works])
    assert (fit.alpha, fit.beta, fit.delta) == pytest.approx((ALPHA, BETA, DELTA), rel=1e-6)
    assert fit.worst_error < 1e-9
    assert fit.seconds(works[3]) == pytest.approx(true_seconds(works[3]))


def test_a_fit_tells_how_far_it_is_off() -> None:
    random = np.random.default_rng(1)
    works = random_decodes(random, 400)
    fit = fit_decodes(works, [true_seconds(work) * (1 + random.normal(0, 0.05)) for work in works])
    assert 0.02 < fit.median_error < 0.05 < fit.worst_error < 0.25
    assert (fit.alpha, fit.beta, fit.delta) == pytest.approx((ALPHA, BETA, DELTA), rel=0.1)


def prior_seconds(stage: int, work: StepWork) -> float:
    """Tokens with a step at 128, and context."""
    plateau = -(-work.num_tokens // 128) * 1e-2
    return (plateau + 2e-8 * work.decode_context_tokens + 1e-8 * work.prefill_pairs) * (1 + stage)


PRIOR = FormulaCost(prior_seconds, num_stages=2, handoff_seconds_per_token=1e-6, control_seconds=1e-3)


def test_without_a_step_the_prior_holds() -> None:
    live: CostModel = OnlineCost(PRIOR)
    work = StepWork.decode(100, 10_000)
    assert live.num_stages == 2
    assert live.control_seconds == 1e-3
    assert live.handoff_seconds(10) == PRIOR.handoff_seconds(10)
    assert [live.stage_seconds(s, work) for s in (0, 1)] == [PRIOR.stage_seconds(s, work) for s in (0, 1)]
    assert OnlineCost(PRIOR).median_error() is None


def test_waiting_for_kv_is_no_part_of_a_steps_cost() -> None:
    live = OnlineCost(PRIOR)
    work = StepWork.decode(64, 6400)
    for stall in (0.0, 1.0, 3.0):
        seconds = [2 * PRIOR.stage_seconds(stage, work) + stall for stage in (0, 1)]
        live.observe(work, seconds, [LinkUse(stall_seconds=stall)] * 2)
    assert live.stage_seconds(1, work) == pytest.approx(2 * PRIOR.stage_seconds(1, work), rel=0.02)


def test_a_step_too_short_for_the_clock_says_nothing() -> None:
    live = OnlineCost(PRIOR)
    work = StepWork.decode(64, 6400)
    live.observe(work, [0.0, 3 * PRIOR.stage_seconds(1, work)])
    assert live.stage_seconds(0, work) == PRIOR.stage_seconds(0, work)
    assert live.stage_seconds(1, work) > 2 * PRIOR.stage_seconds(1, work)


def test_a_few_steps_correct_the_scale_and_keep_the_tile_edge() -> None:
    live = OnlineCost(PRIOR)
    for num in (100, 60, 120, 90):
        work = StepWork.decode(num, num * 200)
        live.observe(work, [2.5 * PRIOR.stage_seconds(0, work), 0.5 * PRIOR.stage_seconds(1, work)])
    for num in (128, 129, 10, 300):
        work = StepWork.decode(num, num * 400)
        assert live.stage_seconds(0, work) == pytest.approx(2.5 * PRIOR.stage_seconds(0, work), rel=0.02)
        assert live.stage_seconds(1, work) == pytest.approx(0.5 * PRIOR.stage_seconds(1, work), rel=0.02)


def test_prompts_and_decodes_are_corrected_apart() -> None:
    live = OnlineCost(PRIOR)
    decode, prompt = StepWork.decode(64, 6400), StepWork.prefill(500)
    for _ in range(20):
        live.observe(decode, [PRIOR.stage_seconds(stage, decode) * 2 for stage in (0, 1)])
    assert live.stage_seconds(0, prompt) == PRIOR.stage_seconds(0, prompt)
    assert live.stage_seconds(0, decode) == pytest.approx(2 * PRIOR.stage_seconds(0, decode), rel=0.02)


@pytest.mark.parametrize("slow_share", [0.0, 0.1])
def test_the_shape_is_learned_in_spite_of_noise_and_outliers(slow_share: float) -> None:
    """The truth's context costs five times the prior's, its tokens half; now and then a step stalls for long."""
    random = np.random.default_rng(2)

    def truth(work: StepWork) -> float:
        return 0.5 * PRIOR.stage_seconds(0, work) + 9e-8 * work.decode_context_tokens + 1e-3

    live = OnlineCost(PRIOR)
    works = random_decodes(random, 400)
    for work in works:
        stall = 4.0 if random.random() < slow_share else 1.0
        live.observe(work, [truth(work) * stall * (1 + random.normal(0, 0.02)), 1e-2])
    fresh = random_decodes(random, 200)
    errors = np.array([abs(live.stage_seconds(0, work) / truth(work) - 1) for work in fresh])
    assert np.median(errors) < 0.02
    assert np.quantile(errors, 0.9) < 0.05  # what PipeMax reports of its estimator
    first = np.array([abs(PRIOR.stage_seconds(0, work) / truth(work) - 1) for work in fresh])
    assert np.median(errors) < np.median(first) / 10


def test_a_device_that_changes_its_pace_is_followed() -> None:
    live = OnlineCost(PRIOR)
    works = random_decodes(np.random.default_rng(3), 600)
    for number, work in enumerate(works):
        factor = 1.0 if number < 300 else 1.6
        live.observe(work, [factor * PRIOR.stage_seconds(stage, work) for stage in (0, 1)])
    work = works[-1]
    assert live.stage_seconds(0, work) == pytest.approx(1.6 * PRIOR.stage_seconds(0, work), rel=0.01)
    error = live.median_error()
    assert error is not None and error < 0.01


@given(
    measured=st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 2000), st.floats(1e-4, 1.0)), min_size=1, max_size=20
    ),
    num_sequences=st.integers(1, 512),
    context_each=st.integers(1, 4000),
)
@example(measured=[(10, 159, 0.002), (241, 12, 0.07), (59, 367, 0.06)], num_sequences=1, context_each=1)
def test_whatever_was_measured_a_step_takes_time(
    measured: list[tuple[int, int, float]], num_sequences: int, context_each: int
) -> None:
    """Also where the best factor on the prior is negative: its small steps are much too slow."""
    live = OnlineCost(PRIOR)
    for number, each, seconds in measured:
        live.observe(StepWork.decode(number, number * each), [seconds, seconds])
    work = StepWork.decode(num_sequences, num_sequences * context_each)
    assert all(live.stage_seconds(stage, work) > 0 for stage in (0, 1))
