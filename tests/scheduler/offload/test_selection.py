"""KV on two tiers: selections within their bounds, nobody starves, and the capacity law met on the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.scheduler.offload.circulation import Circulation, Manner
from batchpipe.scheduler.offload.circulation_clock import CirculatedRun, Rates, run_circulation
from batchpipe.scheduler.offload.decode_time import DecodeTime
from batchpipe.scheduler.offload.residency import Tiers, Window
from batchpipe.scheduler.offload.selection import (
    Aim,
    Candidates,
    StallFeedback,
    batch_capacity_blocks,
    evictions,
    greedy,
    pipeline_capacity_tokens,
    prefetch_budget_bytes,
    prefills_next,
    refined,
    select,
)
from tests.cost.formula_cost import FormulaCost

BLOCK_TOKENS = 16
TIME = DecodeTime(0.010 + 0.00005 * np.maximum(0, np.arange(4097) - 64), 1e-8)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Candidates, Aim]:
    count = draw(st.integers(0, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    context = random.integers(1, draw(st.sampled_from([50, 500, 4000])), count)
    candidates = Candidates(context, -(-(context + 1) // BLOCK_TOKENS), random.integers(0, 200, count))
    aim = Aim(
        time=TIME,
        limit_blocks=draw(st.integers(1, 3000)),
        max_sequences=draw(st.integers(1, 256)),
        num_kept=draw(st.integers(0, 200)),
        kept_context_tokens=draw(st.integers(0, 100_000)),
        num_other_rows=draw(st.integers(0, 200)),
        target_seconds=draw(st.sampled_from([None, 0.005, 0.012, 0.1])),
        max_wait_steps=draw(st.sampled_from([1, 100, 1000])),
    )
    return candidates, aim


def objective(candidates: Candidates, aim: Aim, chosen: np.ndarray) -> float:
    context, blocks = candidates.context_tokens[chosen].sum(), candidates.blocks[chosen].sum()
    return float(aim.objective(int(chosen.sum()), context, blocks))


@given(choice=choices())
def test_a_selection_keeps_to_budget_room_and_number(choice: tuple[Candidates, Aim]) -> None:
    candidates, aim = choice
    chosen = select(candidates, aim)
    assert candidates.blocks[chosen].sum() <= aim.limit_blocks
    assert chosen.sum() <= aim.max_sequences


@given(choice=choices())
def test_refinement_never_worsens_the_objective(choice: tuple[Candidates, Aim]) -> None:
    candidates, aim = choice
    overdue = candidates.waited_steps >= aim.max_wait_steps
    first = greedy(candidates, aim, overdue)
    better = refined(candidates, aim, first, overdue)
    assert objective(candidates, aim, better) <= objective(candidates, aim, first)
    assert (better & overdue).sum() >= (first & overdue).sum(), "one who waited too long was dropped"


@given(choice=choices())
def test_who_waited_longest_is_loaded_where_it_fits_and_is_overdue(choice: tuple[Candidates, Aim]) -> None:
    candidates, aim = choice
    if not len(candidates.blocks):
        return
    longest = int(np.argmax(candidates.waited_steps))
    if candidates.waited_steps[longest] >= aim.max_wait_steps and candidates.blocks[longest] <= aim.limit_blocks:
        chosen = select(candidates, aim)
        ties = candidates.waited_steps == candidates.waited_steps[longest]
        assert chosen[ties].any() or not (candidates.blocks[ties] <= aim.limit_blocks).all()


@given(choice=choices())
def test_with_a_link_without_end_everything_is_loaded(choice: tuple[Candidates, Aim]) -> None:
    candidates, aim = choice
    aim = replace(aim, limit_blocks=10**9, max_sequences=10**6, target_seconds=None)
    assert select(candidates, aim).all()


def test_short_sequences_first_in_the_warm_up_and_the_time_of_the_others_after_it() -> None:
    context = np.array([100, 900, 200, 800, 300, 700])
    candidates = Candidates(context, -(-context // BLOCK_TOKENS), np.zeros(6, dtype=np.int64))
    aim = Aim(TIME, 40, 10, 64, 0, 0, None, 100)
    assert greedy(candidates, aim, np.zeros(6, dtype=np.bool_)).tolist() == [True, False, True, False, True, False]
    slower = DecodeTime(0.010 + 0.001 * np.arange(512, dtype=np.float64), 0.0)
    aim = Aim(slower, 100, 10, 10, 0, 0, 0.022, 100)
    assert select(candidates, aim).sum() == 2, "ten kept and two more take the target's time"


def test_a_budget_is_time_by_rate_and_no_link_leaves_batches_their_share_of_the_device() -> None:
    assert prefetch_budget_bytes(0.022, 50e9) == pytest.approx(1.1e9)
    assert batch_capacity_blocks(8000, 0, 8, 2) == 1000
    # RTX 5090, Llama-2-70B over eight stages: 9.6 GB, 1.14 GB in a step of 22 ms
    assert batch_capacity_blocks(9600, 1140, 8, 2) / 1200 == pytest.approx(1 + 6 * 1.14 / 9.6)
    assert batch_capacity_blocks(8000, 10**6, 8, 2) == 4000, "two batches fill the device"
    assert batch_capacity_blocks(2000, 500, 2, 2) == 1000, "two stages gain nothing by whole batches"
    assert batch_capacity_blocks(2000, 500, 2, 0.2) == pytest.approx(1450), "but by groups of layers"


def test_stages_with_watermarks_of_their_own_hold_more_than_the_least_of_each() -> None:
    own = pipeline_capacity_tokens([8e9, 10e9], [2e9, 1e9], [100, 100], 4, 2)
    least = pipeline_capacity_tokens([8e9, 8e9], [1e9, 1e9], [100, 100], 4, 2)
    assert own == pytest.approx(12e9 / 4 / 100) and least == pytest.approx(10e9 / 4 / 100)


def test_batches_grow_to_the_edge_and_no_further() -> None:
    flat = DecodeTime(np.where(np.arange(513) <= 128, 0.010, 0.010 * np.arange(513) / 128), 0.0)
    assert flat.edge_sequences(512, 0.0) == pytest.approx(128, abs=2)
    assert flat.edge_sequences(64, 0.0) == 64
    # 30 blocks each, and 3000 whatever the time
    assert flat.steady_sequences(512, 0.0, 30.0, lambda seconds: np.full(len(seconds), 3000.0)) == 100


@given(
    blocks=st.lists(st.integers(1, 100), max_size=30),
    needed=st.integers(-5, 500),
    seed=st.integers(0, 100),
)
def test_evictions_free_enough_and_nobody_in_vain(blocks: list[int], needed: int, seed: int) -> None:
    sizes = np.array(blocks, dtype=np.int64)
    away = np.random.default_rng(seed).integers(0, 8, len(sizes))
    leaving = evictions(sizes, away, needed)
    assert sizes[leaving].sum() >= min(needed, sizes.sum())
    assert sizes[leaving[:-1]].sum() < max(needed, 1)
    staying = np.setdiff1d(np.arange(len(sizes)), leaving)
    assert not len(leaving) or not len(staying) or away[leaving].min() >= away[staying].max()


def test_phases_turn_at_the_watermark_and_where_the_rest_fits_the_device() -> None:
    assert prefills_next(True, 800, 10, 100, 1000)
    assert not prefills_next(True, 895, 10, 100, 1000)
    assert not prefills_next(False, 101, 10, 100, 1000)
    assert prefills_next(False, 100, 10, 100, 1000)


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


# -- batches that circulate ---------------------------------------------------------------------------------------


def flat_cost(num_stages: int) -> FormulaCost:
    """Any step of up to 128 rows takes 10 ms a stage."""
    return FormulaCost(lambda stage, work: 0.010 * max(1.0, work.num_tokens / 128), num_stages)


def tiers_of(link_blocks_per_step: float, device_blocks: int = 4000) -> Tiers:
    return Tiers(
        device_blocks=device_blocks, host_blocks=20_000, block_tokens=BLOCK_TOKENS, block_bytes=1000,
        load_bytes_per_second=link_blocks_per_step * 1000 / 0.010,
    )  # fmt: skip


def manner_of(window: Window, num_batches: int, rides: bool = False) -> Manner:
    return Manner(
        num_batches=num_batches, window=window, num_groups=10, fixed_budget_blocks=None, rides=rides, edge=rides,
        corrected=rides, max_step_tokens=512, max_batch_sequences=256,
    )  # fmt: skip


def circulate(
    tiers: Tiers, manner: Manner, prompts: np.ndarray, outputs: np.ndarray, num_stages: int
) -> tuple[Circulation, CirculatedRun]:
    cost = flat_cost(num_stages)
    circulation = Circulation(prompts, outputs, tiers, manner, DecodeTime.of(cost, 1024))
    rates = Rates(tiers.load_bytes_per_second, tiers.load_bytes_per_second, lambda index: 1.0)
    return circulation, run_circulation(circulation, cost, rates, after_decision=circulation.residency.check)


@pytest.mark.parametrize(("window", "num_buffers"), [(Window.BATCH, 2.0), (Window.LAYERS, 0.2)])
@pytest.mark.parametrize(("num_stages", "link"), [(4, 200), (8, 60), (8, 120)])
def test_batches_reach_the_capacity_law(window: Window, num_buffers: float, num_stages: int, link: int) -> None:
    random = np.random.default_rng(1)
    prompts, outputs = random.integers(300, 500, 300), np.full(300, 200)
    tiers = tiers_of(link)
    circulation, run = circulate(tiers, manner_of(window, num_stages), prompts, outputs, num_stages)
    # Steps take 10 ms; some of the device is kept for prompts in transit.
    room = tiers.device_blocks - -(-(512 + int(prompts.max())) // BLOCK_TOKENS)
    law = float(batch_capacity_blocks(room, link, num_stages, num_buffers))
    middle = slice(len(run.batch_blocks) // 4, len(run.batch_blocks) // 2)
    assert np.mean(run.batch_blocks[middle]) == pytest.approx(law, rel=0.05)


@settings(max_examples=30)
@given(
    window=st.sampled_from(list(Window)),
    num_stages=st.integers(2, 6),
    one_more=st.booleans(),
    rides=st.booleans(),
    link=st.sampled_from([1, 20, 300]),
    seed=st.integers(0, 1000),
)
def test_every_sequence_ends_whole_and_both_tiers_hold(
    window: Window, num_stages: int, one_more: bool, rides: bool, link: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    prompts, outputs = random.integers(1, 400, 60), random.integers(1, 60, 60)
    manner = manner_of(window, num_stages + one_more, rides)
    circulation, run = circulate(tiers_of(link, 400), manner, prompts, outputs, num_stages)
    assert (circulation.residency.context_tokens == prompts + outputs - 1).all()
    assert sum(run.num_decodes) == (outputs - 1).sum(), "a token was drawn twice or never"
    assert not circulation.residency.on_device.any() and not len(circulation.residency.live)


def test_more_link_never_makes_a_batch_smaller_and_stalls_are_for_fixed_budgets() -> None:
    random = np.random.default_rng(2)
    prompts, outputs = random.integers(300, 500, 160), np.full(160, 60)
    found = [
        circulate(tiers_of(link, 1500), manner_of(Window.BATCH, 8), prompts, outputs, 8)[1] for link in (1, 60, 120)
    ]
    assert sorted(run.seconds for run in reversed(found)) == [run.seconds for run in reversed(found)]
    greedy_manner = replace(manner_of(Window.BATCH, 8), fixed_budget_blocks=180)
    stalled = circulate(tiers_of(60, 1500), greedy_manner, prompts, outputs, 8)[1]
    assert stalled.stall_seconds > 10 * found[1].stall_seconds
