"""The forecast of KV in use, against rows drawn from the very curves it is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.predict.base import Survival
from batchpipe.scheduler.policies.kv_forecast import KvForecast
from batchpipe.scheduler.sequence import RequestGroup, SequenceState
from tests.scheduler.scheduler_cases import request

BLOCK_TOKENS = 4
# Class 0 lives 0 to 100 tokens, evenly; class 1 always 40.
CURVES = Survival(np.array([0, 39, 40, 100], np.int32), np.array([[1.0, 0.61, 0.6, 0.0], [1.0, 1.0, 0.0, 0.0]]))


def sequence(
    index: int, num_prompt: int, num_generated: int, length_class: int, max_tokens: int = 100
) -> SequenceState:
    made = request(index, num_prompt, max_tokens=max_tokens)
    return SequenceState(
        sequence_id=index,
        group=RequestGroup(made, [None], 1),
        sample_index=0,
        stream=index,
        matcher=None,
        prompt=made.prompt_token_ids,
        num_tokens=num_prompt + num_generated,
        max_tokens=max_tokens,
        end_token_ids=frozenset(),
        length_class=length_class,
        generated=[1] * num_generated,
    )


def test_a_sure_length_is_forecast_exactly() -> None:
    forecast = KvForecast(CURVES, BLOCK_TOKENS, [sequence(0, 10, 0, 1)])
    alive = forecast.offsets_tokens < 39
    half_block = (BLOCK_TOKENS - 1) / 2
    assert forecast.mean_blocks[alive] == pytest.approx(
        (10 + forecast.offsets_tokens[alive] + half_block) / BLOCK_TOKENS
    )
    assert (forecast.mean_blocks[forecast.offsets_tokens >= 40] == 0).all()
    assert forecast.peak_blocks() == pytest.approx(forecast.mean_blocks.max())  # nothing is uncertain


def test_what_was_generated_counts() -> None:
    fresh = KvForecast(CURVES, BLOCK_TOKENS, [sequence(0, 50, 0, 1)])
    old = KvForecast(CURVES, BLOCK_TOKENS, [sequence(0, 14, 36, 1)])
    late = fresh.offsets_tokens >= 8
    assert fresh.mean_blocks[late].sum() > 0
    assert old.mean_blocks[late].sum() == 0


def test_a_row_past_its_curve_counts_in_full_until_its_limit() -> None:
    forecast = KvForecast(CURVES, BLOCK_TOKENS, [sequence(0, 10, 50, 1, max_tokens=90)])
    assert (forecast.mean_blocks[forecast.offsets_tokens < 40] > 0).all()
    assert (forecast.mean_blocks[forecast.offsets_tokens >= 40] == 0).all()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 38), st.integers(0, 1)), min_size=1, max_size=20))
def test_adding_is_the_same_as_building_with_all(rows: list[tuple[int, int, int]]) -> None:
    sequences = [sequence(i, *row) for i, row in enumerate(rows)]
    whole = KvForecast(CURVES, BLOCK_TOKENS, sequences)
    grown = KvForecast(CURVES, BLOCK_TOKENS, sequences[:-1])
    assert grown.peak_blocks_with(sequences[-1])[1] == pytest.approx(whole.peak_blocks())
    grown.add(sequences[-1])
    assert grown.mean_blocks == pytest.approx(whole.mean_blocks)
    assert grown.peak_blocks() == pytest.approx(whole.peak_blocks())


def test_the_peak_is_seldom_passed_at_its_moment_and_is_no_worst_case() -> None:
    rows = [sequence(i, 20, i % 30, 0) for i in range(60)]
    forecast = KvForecast(CURVES, BLOCK_TOKENS, rows)
    moment = forecast.offsets_tokens[forecast.mean_blocks.argmax()]
    random = np.random.default_rng(0)
    generated = np.array([len(row.generated) for row in rows])
    in_use = []
    for _ in range(1000):
        lengths = generated + random.random(len(rows)) * (100 - generated)  # uniform, given what was generated
        alive = generated + moment < lengths
        in_use.append((np.ceil((20 + generated + moment) / BLOCK_TOKENS) * alive).sum())
    assert 0.0 < np.mean(np.array(in_use) > forecast.peak_blocks()) < 0.08
    assert forecast.peak_blocks() < 0.8 * sum(np.ceil(120 / BLOCK_TOKENS) for _ in rows)


def test_a_level_that_is_not_known_is_a_margin_on_what_is_to_come() -> None:
    unsure = Survival(CURVES.grid_tokens, CURVES.alive, level_error=0.2)
    rows = [sequence(i, 20, 0, 1) for i in range(10)]
    sure_peak = KvForecast(CURVES, BLOCK_TOKENS, rows).peak_blocks()
    assert KvForecast(unsure, BLOCK_TOKENS, rows).peak_blocks() == pytest.approx(sure_peak * (1 + 1.65 * 0.2))
    ending = [sequence(i, 20, 39, 1) for i in range(10)]
    held = KvForecast(CURVES, BLOCK_TOKENS, ending).mean_blocks[0]
    assert KvForecast(unsure, BLOCK_TOKENS, ending).peak_blocks() == pytest.approx(held)
