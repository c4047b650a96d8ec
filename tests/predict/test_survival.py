"""How uncertain curves are: the spread of single rows, of their sum, and what it takes to be longer."""

from __future__ import annotations

import numpy as np
import pytest

from batchpipe.predict.base import Survival, length_grid
from batchpipe.predict.online import OnlinePredictor
from batchpipe.types import Int32Array
from tests.predict.test_online import NONE, ShortAndLong

MAX_TOKENS = 600
MEANS = np.array([50.0, 400.0])
NINE_IN_TEN = 1.65  # standard errors


def curves(level_error: float = 0.0) -> Survival:
    grid = length_grid(MAX_TOKENS)
    return Survival(grid, np.exp(-grid[None, :] / MEANS[:, None]), level_error)


def lengths(draw: np.random.Generator, classes: Int32Array, level: float = 1.0) -> Int32Array:
    return np.minimum(np.ceil(draw.exponential(MEANS[classes] * level)), MAX_TOKENS).astype(np.int32)


@pytest.mark.parametrize("limit", [1, 7, 100, 437, MAX_TOKENS, 10_000])
def test_variances_are_those_of_rows_cut_at_their_limit(limit: int) -> None:
    classes = np.repeat([0, 1], 100_000).astype(np.int32)
    drawn = np.minimum(lengths(np.random.default_rng(0), classes), limit).reshape(2, -1)
    found = curves().variances(np.arange(2, dtype=np.int32), np.full(2, limit, np.int32))
    np.testing.assert_allclose(found, drawn.var(axis=1), rtol=0.02, atol=0.1)


def test_nine_sums_in_ten_are_within_their_error() -> None:
    """Whether the rows' own chance is what matters, or how little is known of the level of all."""
    draw = np.random.default_rng(1)
    for level_error, num_rows in ((0.0, 30), (0.2, 1000), (0.1, 30)):
        survival = curves(level_error)
        classes = draw.integers(0, 2, num_rows).astype(np.int32)
        limits = np.full(num_rows, MAX_TOKENS, np.int32)
        expected = survival.expected_tokens(classes, limits).sum()
        error = survival.sum_error(classes, limits)
        sums = np.array([lengths(draw, classes).sum() * draw.normal(1.0, level_error) for _ in range(2000)])
        assert np.mean(np.abs(sums / expected - 1) < NINE_IN_TEN * error) == pytest.approx(0.9, abs=0.03)


def test_what_is_left_of_a_job_is_within_the_error_that_its_rows_so_far_leave() -> None:
    draw = np.random.default_rng(2)
    for num_done in (50, 200, 800):
        covered = []
        for _ in range(100):
            predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
            classes = draw.integers(0, 2, num_done + 1000).astype(np.int32)
            tokens = lengths(draw, classes, level=draw.choice([0.7, 1.0, 1.4]))
            predictor.observe(classes[:num_done], tokens[:num_done], tokens[:num_done] < MAX_TOKENS)
            survival, limits = predictor.survival(NONE, NONE), np.full(1000, MAX_TOKENS, np.int32)
            off = survival.expected_tokens(classes[num_done:], limits).sum() / tokens[num_done:].sum() - 1
            covered.append(abs(off) < NINE_IN_TEN * survival.sum_error(classes[num_done:], limits))
        assert 0.8 <= np.mean(covered) <= 1.0


def test_stretched_curves_have_longer_rows_and_let_more_reach_the_limit() -> None:
    survival = curves()
    classes, endless = np.arange(2, dtype=np.int32), np.full(2, 1 << 20, np.int32)
    twice = survival.stretched(2.0)
    # An exponential whose hazard is halved is one of twice the mean.
    np.testing.assert_allclose(twice.alive[:, -1], np.exp(-MAX_TOKENS / (2 * MEANS)))
    assert twice.expected_tokens(classes, endless)[0] == pytest.approx(2 * 50, rel=0.02)
    assert (
        survival.stretched(0.5).expected_tokens(classes, endless) < survival.expected_tokens(classes, endless)
    ).all()
    np.testing.assert_array_equal(survival.stretched(1.0).alive, survival.alive)


@pytest.mark.parametrize(("num_tokens", "limit"), [(0, MAX_TOKENS), (30, 437), (200, 437), (430, 437)])
def test_what_is_left_of_rows_that_run_is_what_the_longer_ones_have_left(num_tokens: int, limit: int) -> None:
    classes = np.repeat([0, 1], 400_000).astype(np.int32)
    drawn = np.minimum(lengths(np.random.default_rng(3), classes), limit).reshape(2, -1)
    found = curves().expected_left(
        np.arange(2, dtype=np.int32), np.full(2, num_tokens, np.int32), np.full(2, limit, np.int32)
    )
    for left, of_class in zip(found, drawn, strict=True):
        if (longer := of_class[of_class > num_tokens]).size > 1000:
            assert left == pytest.approx((longer - num_tokens).mean(), rel=0.04)


def test_who_is_longer_than_all_that_is_known_has_a_token_left() -> None:
    classes, limits = np.zeros(3, np.int32), np.array([1000, 1000, 700], np.int32)
    assert curves().expected_left(classes, np.array([600, 900, 700], np.int32), limits).tolist() == [1, 1, 1]
