"""The predictor that learns: it starts from the prior, follows the job's pooled lengths, then each class's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from batchpipe.predict.base import Survival, length_grid
from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.quantile import QuantileClassifier
from batchpipe.types import Int32Array

MAX_TOKENS = 2000
NONE = np.zeros(0, np.int32)


class ShortAndLong:
    """Two classes by the first token; elsewhere they had mean lengths of 50 and 400."""

    level_error = 0.5

    def __init__(self) -> None:
        grid = length_grid(10_000)
        alive = np.exp(-grid[None, :] / np.array([[50.0], [400.0]]))
        alive[:, -1] = 0.0
        self.prior = Survival(grid, alive)

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return np.array([prompt[0] for prompt in prompts], np.int32)


def means(survival: Survival) -> list[float]:
    classes = np.arange(survival.num_classes, dtype=np.int32)
    limits = np.full(survival.num_classes, MAX_TOKENS, np.int32)
    found: list[float] = survival.expected_tokens(classes, limits).tolist()
    return found


def lengths(draw: np.random.Generator, mean: float, count: int) -> Int32Array:
    return np.ceil(draw.exponential(mean, count)).astype(np.int32)


def test_before_anything_is_known_it_is_the_prior() -> None:
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    assert means(predictor.survival(NONE, NONE)) == pytest.approx([50, 397], rel=0.02)
    assert predictor.classify([np.array([1, 5], np.int32), np.array([0], np.int32)]).tolist() == [1, 0]


def test_lengths_of_one_class_move_the_other_that_has_none_yet() -> None:
    draw = np.random.default_rng(2)
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    tokens = lengths(draw, 150, 300)  # three times the prior's
    predictor.observe(np.zeros(300, np.int32), tokens, np.ones(300, np.bool_))
    short, long = means(predictor.survival(NONE, NONE))
    assert short == pytest.approx(tokens.mean(), rel=0.05)
    assert long > 1.25 * 397


def test_the_jobs_own_rows_take_over_a_prior_that_is_the_wrong_way_round() -> None:
    draw = np.random.default_rng(3)
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    classes = np.repeat([0, 1], 500).astype(np.int32)
    tokens = np.concatenate([lengths(draw, 300, 500), lengths(draw, 20, 500)])
    predictor.observe(classes, tokens, np.ones(1000, np.bool_))
    found = means(predictor.survival(NONE, NONE))
    assert found == pytest.approx([tokens[:500].mean(), tokens[500:].mean()], abs=20)


def test_running_rows_hold_what_early_finishers_would_pull_down() -> None:
    """Of 400 rows all started at once, only those that ended within 100 steps are finished."""
    draw = np.random.default_rng(4)
    tokens = lengths(draw, 500, 400)
    classes = np.ones(400, np.int32)
    ended = tokens <= 100
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    predictor.observe(classes[ended], tokens[ended], np.ones(ended.sum(), np.bool_))
    with_running = means(predictor.survival(classes[~ended], np.full((~ended).sum(), 100, np.int32)))[1]
    without = means(predictor.survival(NONE, NONE))[1]
    assert without < 120
    assert with_running == pytest.approx(np.minimum(tokens, MAX_TOKENS).mean(), rel=0.2)


def test_the_pooled_curve_is_the_jobs_whatever_the_classes_are_worth() -> None:
    draw = np.random.default_rng(5)
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    classes = draw.integers(0, 2, 200).astype(np.int32)
    tokens = lengths(draw, 90, 200)
    predictor.observe(classes, tokens, np.ones(200, np.bool_))
    predicted = np.array(means(predictor.survival(NONE, NONE)))[classes]
    assert predicted.sum() == pytest.approx(tokens.sum(), rel=0.05)


def test_rows_cut_at_the_limit_say_that_rows_reach_it() -> None:
    predictor = OnlinePredictor(ShortAndLong(), 100)
    classes = np.repeat([0, 1], 500).astype(np.int32)
    predictor.observe(classes, np.full(1000, 100, np.int32), np.zeros(1000, np.bool_))
    survival = predictor.survival(NONE, NONE)
    assert survival.grid_tokens[-1] == 100
    assert survival.alive[:, -1].min() > 0.9


def test_completions_of_one_token() -> None:
    predictor = OnlinePredictor(QuantileClassifier.shipped(), MAX_TOKENS)
    classes = predictor.classify([np.zeros(700, np.int32)] * 500)
    predictor.observe(classes, np.ones(500, np.int32), np.ones(500, np.bool_))
    expected = predictor.survival(NONE, NONE).expected_tokens(classes[:1], np.array([MAX_TOKENS], np.int32))
    assert 1.0 <= expected[0] < 1.5


def test_prompt_length_is_the_class_of_the_classifier_without_training() -> None:
    classifier = QuantileClassifier.shipped()
    prompts = [np.zeros(length, np.int32) for length in (1, 64, 65, 1024, 4096, 4097, 100_000)]
    assert classifier.classify(prompts).tolist() == [0, 0, 1, 4, 6, 7, 7]
    assert classifier.classify([]).tolist() == []
    alive = classifier.prior.alive
    assert alive.shape == (8, len(classifier.prior.grid_tokens))
    assert (alive[:, 0] == 1).all() and (alive[:, -1] == 0).all() and (np.diff(alive, axis=1) <= 0).all()


def test_the_level_is_the_priors_at_first_and_better_known_with_every_row() -> None:
    predictor = OnlinePredictor(ShortAndLong(), MAX_TOKENS)
    draw = np.random.default_rng(0)
    errors = [predictor.survival(NONE, NONE).level_error]
    for _ in range(4):
        predictor.observe(np.zeros(100, np.int32), lengths(draw, 80.0, 100), np.ones(100, np.bool_))
        errors.append(predictor.survival(NONE, NONE).level_error)
    assert errors[0] == 0.5
    assert errors == sorted(errors, reverse=True)
    # An exponential is spread by its mean.
    assert errors[-1] == pytest.approx(1 / 400**0.5, rel=0.15)
