"""PipeMax's two-stage selection: within its bounds, refined for the better, and no sequence starves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.scheduler.offload.two_stage_selection import (
    Candidates,
    DecodeFit,
    PrefetchGoal,
    greedy,
    refined,
    select_two_stage,
)
from batchpipe.types import BoolArray
from tests.cost.formula_cost import FormulaCost

BLOCK_TOKENS = 16
FIT = DecodeFit(sequence_seconds=5e-5, context_token_seconds=1e-8, constant_seconds=0.010)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Candidates, PrefetchGoal]:
    count = draw(st.integers(0, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    context = random.integers(1, draw(st.sampled_from([50, 500, 4000])), count)
    candidates = Candidates(context, -(-(context + 1) // BLOCK_TOKENS), random.integers(0, 200, count) / 8)
    goal = PrefetchGoal(
        fit=FIT,
        limit_blocks=draw(st.integers(1, 3000)),
        max_sequences=draw(st.integers(1, 256)),
        num_resident=draw(st.integers(0, 200)),
        resident_context_tokens=draw(st.integers(0, 100_000)),
        target_seconds=draw(st.sampled_from([None, 0.005, 0.012, 0.1])),
        max_wait_turns=draw(st.sampled_from([0.125, 12.5, 125.0])),
    )
    return candidates, goal


def objective(candidates: Candidates, goal: PrefetchGoal, chosen: BoolArray) -> float:
    context, blocks = candidates.context_tokens[chosen].sum(), candidates.blocks[chosen].sum()
    return float(goal.objective(int(chosen.sum()), context, blocks))


@given(choice=choices())
def test_a_selection_keeps_to_budget_and_number(choice: tuple[Candidates, PrefetchGoal]) -> None:
    candidates, goal = choice
    chosen = select_two_stage(candidates, goal)
    assert candidates.blocks[chosen].sum() <= goal.limit_blocks
    assert chosen.sum() <= goal.max_sequences


@given(choice=choices())
def test_refinement_never_worsens_the_objective(choice: tuple[Candidates, PrefetchGoal]) -> None:
    candidates, goal = choice
    overdue = candidates.waited_turns >= goal.max_wait_turns
    first = greedy(candidates, goal, overdue)
    better = refined(candidates, goal, first, overdue)
    assert objective(candidates, goal, better) <= objective(candidates, goal, first)
    assert (better & overdue).sum() >= (first & overdue).sum(), "an overdue sequence was dropped"


@given(choice=choices())
def test_the_longest_overdue_is_loaded_where_it_fits(choice: tuple[Candidates, PrefetchGoal]) -> None:
    candidates, goal = choice
    if not len(candidates.blocks):
        return
    longest = int(np.argmax(candidates.waited_turns))
    if candidates.waited_turns[longest] >= goal.max_wait_turns and candidates.blocks[longest] <= goal.limit_blocks:
        chosen = select_two_stage(candidates, goal)
        ties = candidates.waited_turns == candidates.waited_turns[longest]
        assert chosen[ties].any() or not (candidates.blocks[ties] <= goal.limit_blocks).all()


@given(choice=choices())
def test_with_an_endless_link_everything_is_loaded(choice: tuple[Candidates, PrefetchGoal]) -> None:
    candidates, goal = choice
    goal = replace(goal, limit_blocks=10**9, max_sequences=10**6, target_seconds=None)
    assert select_two_stage(candidates, goal).all()


def goal_of(**changes: object) -> PrefetchGoal:
    small = PrefetchGoal(
        fit=FIT,
        limit_blocks=40,
        max_sequences=10,
        num_resident=64,
        resident_context_tokens=0,
        target_seconds=None,
        max_wait_turns=12.5,
    )
    return replace(small, **changes)  # type: ignore[arg-type]


def test_the_warm_up_takes_short_sequences_and_the_steady_regime_the_time_of_the_others() -> None:
    context = np.array([100, 900, 200, 800, 300, 700])
    candidates = Candidates(context, -(-context // BLOCK_TOKENS), np.zeros(6))
    short = greedy(candidates, goal_of(), np.zeros(6, dtype=np.bool_))
    assert short.tolist() == [True, False, True, False, True, False]
    slower = DecodeFit(sequence_seconds=0.001, context_token_seconds=0.0, constant_seconds=0.010)
    steady = goal_of(fit=slower, limit_blocks=100, num_resident=10, target_seconds=0.022)
    assert select_two_stage(candidates, steady).sum() == 2, "ten residents and two more take the target's time"


def test_the_fit_is_the_cost_model_where_that_is_a_line_on_its_slowest_stage() -> None:
    cost = FormulaCost(
        lambda stage, work: (1 + stage) * (0.01 + 2e-5 * work.num_decodes + 1e-7 * work.decode_context_tokens),
        num_stages=2,
    )
    fit = DecodeFit.of(cost, 256)
    # A decode's own token is part of what it reads.
    assert fit.sequence_seconds == pytest.approx(2 * (2e-5 + 1e-7))
    assert fit.context_token_seconds == pytest.approx(2e-7)
    assert float(fit.seconds(100, 5000)) == pytest.approx(2 * (0.01 + 100 * 2e-5 + 5100 * 1e-7))
