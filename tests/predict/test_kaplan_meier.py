"""The Kaplan-Meier estimate and the curves: exact without cuts, unbiased with them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.predict.base import Survival, length_grid
from batchpipe.predict.survival import KaplanMeier
from batchpipe.types import BoolArray, Int32Array


def curve(grid: Int32Array, tokens: Int32Array, ended: BoolArray) -> Survival:
    table = KaplanMeier.of(grid, 1, np.zeros(len(tokens), np.int32), tokens, ended)
    return Survival(grid, table.alive(np.ones((1, len(grid))), 0.0))


def mean_of(survival: Survival, max_tokens: int) -> float:
    return float(survival.expected_tokens(np.zeros(1, np.int32), np.array([max_tokens], np.int32))[0])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50), st.integers(1, 60))
def test_without_cuts_the_curve_and_its_mean_are_those_of_the_rows(lengths: list[int], max_tokens: int) -> None:
    tokens = np.array(lengths, np.int32)
    survival = curve(np.arange(61, dtype=np.int32), tokens, np.ones(len(tokens), np.bool_))
    outlived = [(tokens > t).mean() for t in range(61)]
    np.testing.assert_allclose(survival.alive[0], outlived, atol=1e-12)
    np.testing.assert_allclose(mean_of(survival, max_tokens), np.minimum(tokens, max_tokens).mean(), atol=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=60), st.integers(1, 2000))
def test_any_rows_give_curves(rows: list[tuple[int, bool]], max_tokens: int) -> None:
    grid = length_grid(max_tokens)
    tokens = np.array([tokens for tokens, _ in rows], np.int32)
    ended = np.array([ended and tokens > 0 for tokens, ended in rows], np.bool_)
    prior = 1.0 - grid[None, :] / grid[-1]
    alive = KaplanMeier.of(grid, 1, np.zeros(len(rows), np.int32), tokens, ended).alive(prior, 1.0)
    assert alive[0, 0] == 1.0
    assert (np.diff(alive) <= 0).all() and (alive >= 0).all()


@given(st.data())
def test_tables_of_parts_add_up_to_the_table_of_all(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100), st.booleans()), max_size=40))
    cut = data.draw(st.integers(0, len(rows)))
    grid = length_grid(80)

    def table(part: list[tuple[int, int, bool]]) -> KaplanMeier:
        columns = np.array(part, np.int32).reshape(-1, 3)
        return KaplanMeier.of(grid, 3, columns[:, 0], columns[:, 1], columns[:, 2].astype(np.bool_))

    total, whole = table(rows[:cut]) + table(rows[cut:]), table(rows)
    np.testing.assert_allclose(total.at_risk, whole.at_risk)
    np.testing.assert_allclose(total.ended, whole.ended)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(40, 400), st.floats(0.7, 2.0), st.integers(30, 600))
def test_cut_rows_bias_nothing(seed: int, scale: float, shape: float, cut_scale: int) -> None:
    """Lengths beyond a cut of their own are only known to be beyond it; the naive mean would be far too short."""
    draw = np.random.default_rng(seed)
    num_rows = 20_000
    lengths = np.ceil(scale * draw.weibull(shape, num_rows)).astype(np.int32)
    cuts = draw.integers(1, cut_scale * 2, num_rows).astype(np.int32)
    survival = curve(length_grid(5000), np.minimum(lengths, cuts), lengths <= cuts)
    limit = cut_scale  # half of the rows could have been seen up to here
    truth = np.minimum(lengths, limit)
    assert abs(mean_of(survival, limit) - truth.mean()) < 5 * truth.std() / np.sqrt(num_rows / 4) + 0.01 * truth.mean()


def test_of_rows_that_started_together_the_short_ones_do_not_pull_the_curve_down() -> None:
    draw = np.random.default_rng(1)
    lengths = np.ceil(draw.exponential(300, 10_000)).astype(np.int32)
    steps = 200  # every row has run so long
    ended = lengths <= steps
    finished_alone = lengths[ended].mean()
    survival = curve(length_grid(4000), np.minimum(lengths, steps), ended)
    truth = np.minimum(lengths, steps).mean()
    assert finished_alone < 0.7 * truth
    assert abs(mean_of(survival, steps) / truth - 1) < 0.01


def test_a_row_counts_up_to_where_it_was_cut_even_inside_a_bin() -> None:
    grid = np.array([0, 10, 20], np.int32)
    table = KaplanMeier.of(
        grid, 1, np.zeros(3, np.int32), np.array([15, 20, 10], np.int32), np.array([False, True, False])
    )
    np.testing.assert_allclose(table.at_risk, [[3.0, 1.5]])
    np.testing.assert_allclose(table.ended, [[0.0, 1.0]])


def test_what_is_longer_than_the_grid_is_cut_at_its_end() -> None:
    grid = np.array([0, 10, 20], np.int32)
    table = KaplanMeier.of(grid, 1, np.zeros(1, np.int32), np.array([21], np.int32), np.array([True]))
    np.testing.assert_allclose(table.at_risk, [[1.0, 1.0]])
    assert table.ended.sum() == 0


@given(st.integers(1, 100_000))
def test_the_grid_ends_at_the_limit_and_has_a_few_dozen_bins(max_tokens: int) -> None:
    grid = length_grid(max_tokens)
    assert grid[0] == 0 and grid[-1] == max_tokens
    assert (np.diff(grid) > 0).all() and len(grid) < 130


def test_survival_between_points_and_behind_the_end() -> None:
    survival = Survival(np.array([0, 4, 8], np.int32), np.array([[1.0, 0.5, 0.25], [1.0, 1.0, 0.0]]))
    classes = np.array([0, 1], np.int32)
    tokens = np.array([[0.0, 2.0, 4.0, 6.0, 8.0, 9.0]] * 2)
    expected = [[1.0, 0.75, 0.5, 0.375, 0.25, 0.0], [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]]
    np.testing.assert_allclose(survival.at(classes, tokens), expected)
    np.testing.assert_allclose(survival.at(classes, tokens[:, 3]), [0.375, 0.5])
    # P(length > 0) + .. + P(length > 7)
    sums = survival.at(classes, np.tile(np.arange(8.0), (2, 1))).sum(axis=1)
    np.testing.assert_allclose(survival.expected_tokens(classes, np.array([8, 100], np.int32)), sums)
    np.testing.assert_allclose(survival.expected_tokens(classes, np.array([1, 6], np.int32)), [1.0, 5.75])
