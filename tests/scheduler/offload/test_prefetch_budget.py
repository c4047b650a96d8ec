"""The budget of loads on a link with noise: it fills the link, keeps stalls small, and follows a link that changes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.cost.model import KvLink
from batchpipe.scheduler.offload.prefetch_budget import GROWTH, START_BLOCKS, PrefetchBudget, StallFeedback
from batchpipe.types import LinkUse
from tests.cost.formula_cost import FormulaCost

BLOCK_TOKENS = 16
KV_BYTES_PER_TOKEN = 1000
STEP_SECONDS = 0.05
TRUE_BLOCKS = 500  # that the link carries during a step
RATE = TRUE_BLOCKS / STEP_SECONDS


def expected(scale: float) -> FormulaCost:
    """A cost model that only knows the link, `scale` times as fast as it is; the second stage's is the faster one."""
    bytes_per_second = scale * RATE * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
    links = tuple(KvLink(more * bytes_per_second, 1e9, KV_BYTES_PER_TOKEN // 10, 10) for more in (1, 3))
    return FormulaCost(num_stages=2, kv_links=links)


def uses_of(num_blocks: int, seconds_each: tuple[float, ...]) -> tuple[list[float], list[LinkUse]]:
    """Stage times and link uses of a step whose loads stand beside the whole step, block times by stage."""
    uses = [
        LinkUse(max(0.0, num_blocks * each - STEP_SECONDS), num_blocks * 16_000, 0, num_blocks * each, 0.0)
        for each in seconds_each
    ]
    return [STEP_SECONDS + use.stall_seconds for use in uses], uses


def drive(
    budget: PrefetchBudget, num_steps: int, noise: float = 0.0, share: Callable[[int], float] = lambda step: 1.0
) -> tuple[list[int], list[float]]:
    """Blocks of each step and the stages' mean stall as a part of it, where whatever the budget allows is loaded."""
    random = np.random.default_rng(0)
    loaded, stalls = [], []
    for step in range(num_steps):
        num_blocks = budget.blocks(STEP_SECONDS)
        rate = RATE * share(step) * float(np.exp(random.normal(-(noise**2) / 2, noise)))
        stage_seconds, uses = uses_of(num_blocks, (1 / rate, 1 / (3 * rate)))
        budget.observe(num_blocks, stage_seconds, uses)
        loaded.append(num_blocks)
        stalls.append(mean(use.stall_seconds for use in uses) / STEP_SECONDS)
    return loaded, stalls


def test_before_anything_is_loaded_the_cost_models_link_counts() -> None:
    assert PrefetchBudget(expected(1.0), BLOCK_TOKENS).blocks(STEP_SECONDS) == TRUE_BLOCKS
    assert PrefetchBudget(expected(0.5), BLOCK_TOKENS).blocks(2 * STEP_SECONDS) == TRUE_BLOCKS


def test_without_a_rate_it_starts_small_and_doubles_at_most() -> None:
    loaded, _ = drive(PrefetchBudget(None, BLOCK_TOKENS), 30)
    assert loaded[0] == START_BLOCKS
    assert all(after <= GROWTH * before for before, after in zip(loaded, loaded[1:], strict=False))
    assert loaded[-1] == pytest.approx(TRUE_BLOCKS, rel=0.02)


@pytest.mark.parametrize("scale", [None, 0.2, 1.0, 5.0])
@pytest.mark.parametrize(("noise", "least_share", "most_stall"), [(0.0, 0.99, 0.011), (0.1, 0.84, 0.012)])
def test_it_settles_at_what_the_link_carries(
    scale: float | None, noise: float, least_share: float, most_stall: float
) -> None:
    budget = PrefetchBudget(None if scale is None else expected(scale), BLOCK_TOKENS)
    loaded, stalls = drive(budget, 600, noise)
    assert least_share * TRUE_BLOCKS <= mean(loaded[100:]) <= 1.02 * TRUE_BLOCKS
    assert mean(stalls[100:]) <= most_stall


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_link_that_drops_to_a_tenth_and_comes_back_is_followed_at_once(noise: float) -> None:
    budget = PrefetchBudget(expected(1.0), BLOCK_TOKENS)
    loaded, stalls = drive(budget, 400, noise, lambda step: 0.1 if 200 <= step < 300 else 1.0)
    before = mean(loaded[150:200])
    assert before >= 0.8 * TRUE_BLOCKS
    assert all(num_blocks <= 0.12 * TRUE_BLOCKS for num_blocks in loaded[205:300])
    assert mean(stalls[206:300]) <= 0.02
    assert mean(loaded[306:316]) >= 0.9 * before


def test_a_stall_of_the_first_of_eight_stages_is_weighed_by_what_a_round_loses() -> None:
    """A step's first stage waits for a tenth of its loads, whatever their number; seven stages never do."""
    budget = PrefetchBudget(expected(1.0), BLOCK_TOKENS)
    for _ in range(1000):
        num_blocks = budget.blocks(STEP_SECONDS)
        each = num_blocks / RATE
        uses = [LinkUse(0.1 * each * (stage == 0), num_blocks * 16_000, 0, each, 0.0) for stage in range(8)]
        budget.observe(num_blocks, [STEP_SECONDS + use.stall_seconds for use in uses], uses)
    assert 0.7 * TRUE_BLOCKS <= budget.blocks(STEP_SECONDS) <= TRUE_BLOCKS


def test_what_nothing_can_hide_is_no_reason_to_load_less() -> None:
    budgets = [PrefetchBudget(expected(1.0), BLOCK_TOKENS, share) for share in (0.1, 0.0)]
    for budget in budgets:
        for _ in range(1000):
            num_blocks = budget.blocks(STEP_SECONDS)
            each = num_blocks / RATE
            stall_seconds = 0.1 * each + max(0.0, 0.9 * each - STEP_SECONDS)
            use = LinkUse(stall_seconds, num_blocks * 16_000, 0, each, 0.0)
            budget.observe(num_blocks, [STEP_SECONDS + stall_seconds], [use])
    told, untold = (budget.blocks(STEP_SECONDS) for budget in budgets)
    assert told >= TRUE_BLOCKS
    assert untold < 0.2 * TRUE_BLOCKS


def test_a_single_slow_copy_changes_little() -> None:
    budget = PrefetchBudget(expected(1.0), BLOCK_TOKENS)
    loaded, _ = drive(budget, 120, share=lambda step: 0.02 if step == 100 else 1.0)
    assert min(loaded[90:]) >= 0.9 * TRUE_BLOCKS


def test_steps_that_load_little_teach_no_larger_budget() -> None:
    budget = PrefetchBudget(expected(1.0), BLOCK_TOKENS)
    for _ in range(1000):
        budget.observe(TRUE_BLOCKS // 10, *uses_of(TRUE_BLOCKS // 10, (1 / RATE,)))
        budget.observe(0, *uses_of(0, (1 / RATE,)))
    assert budget.factor == 1.0
    assert budget.blocks(STEP_SECONDS) == TRUE_BLOCKS


def test_even_the_slowest_link_is_tried_again() -> None:
    budget = PrefetchBudget(expected(1e-6), BLOCK_TOKENS)
    assert budget.blocks(STEP_SECONDS) == 1
    loaded, _ = drive(budget, 20)
    assert loaded[-1] >= 0.9 * TRUE_BLOCKS


def test_an_unpredicted_step_is_taken_to_be_as_long_as_the_last_one_without_its_stall() -> None:
    budget = PrefetchBudget(expected(1.0), BLOCK_TOKENS)
    assert budget.blocks() == START_BLOCKS
    stage_seconds, uses = uses_of(2 * TRUE_BLOCKS, (1 / RATE,))
    budget.observe(2 * TRUE_BLOCKS, stage_seconds, uses)
    assert stage_seconds[0] == pytest.approx(2 * STEP_SECONDS)
    assert budget.blocks() == budget.blocks(STEP_SECONDS) == TRUE_BLOCKS


@given(shares=st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_the_correction_stays_within_its_bounds(shares: list[float]) -> None:
    feedback = StallFeedback()
    for share in shares:
        feedback.observe(share * 0.01, 0.01)
        assert StallFeedback.LEAST <= feedback.factor <= StallFeedback.MOST


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_the_correction_finds_what_the_link_really_carries(rate: float) -> None:
    feedback = StallFeedback()
    for _ in range(2000):
        feedback.observe(max(0.0, feedback.factor / rate - 1), 1.0)
    assert feedback.factor == pytest.approx(rate, rel=0.05)
