"""Predictions in an engine: classes and expectations for new requests, learning from finished ones."""

from __future__ import annotations

import numpy as np

from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.quantile import QuantileClassifier
from batchpipe.runner.engine import Engine
from batchpipe.types import FinishedRequest
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import EOS, capacity, fake, request


def finished_by(schedule: str, rows: int, max_tokens: int) -> tuple[list[FinishedRequest], Engine]:
    predictor = OnlinePredictor(QuantileClassifier.shipped(), 200)
    engine = Engine([fake(capacity(num_blocks=400))], schedule, frozenset({EOS}), lambda params: None, predictor)
    finished: list[FinishedRequest] = []
    for start in range(0, rows, 20):
        coming = [request(i, 5 + i % 40, max_tokens=max_tokens) for i in range(start, start + 20)]
        finished += run_engine(engine, coming)
    return finished, engine


def test_expectations_come_to_be_those_of_the_jobs_own_rows() -> None:
    finished, _ = finished_by("temporal", 400, 200)
    lengths = np.array([len(end.completions[0].token_ids) for end in finished])
    expected = np.array([end.request.predicted_tokens for end in finished])
    assert lengths.mean() < 12  # this pipeline ends a row after eight tokens or so
    assert expected[:20].mean() > 4 * lengths.mean()
    assert abs(expected[-100:].mean() / lengths.mean() - 1) < 0.25


def test_a_row_cut_at_its_limit_is_no_short_row() -> None:
    finished, _ = finished_by("hybrid", 200, 2)
    expected = np.array([end.request.predicted_tokens for end in finished])
    assert (expected[-50:] == 2).all()


def test_every_planner_gets_the_curves() -> None:
    _, engine = finished_by("temporal", 20, 10)
    assert all(replica.scheduler.state.survival is not None for replica in engine.replicas)


def test_rows_that_run_count_by_what_of_them_is_done() -> None:
    predictor = OnlinePredictor(QuantileClassifier.shipped(), 200)
    engine = Engine([fake(capacity(num_blocks=400))], "temporal", frozenset({EOS}), lambda params: None, predictor)
    engine.add(request(i, 5 + i % 40, max_tokens=200) for i in range(400))
    num_finished, done_rows, done_tokens = 0, [], []
    assert engine.rows_under_way == 0
    while not engine.idle:
        num_finished += len(engine.advance())
        done_rows.append(num_finished + engine.rows_under_way)
        done_tokens.append(engine.meter.output_tokens)
    assert engine.rows_under_way == 0 and num_finished == 400
    # Once lengths are known, a part of the rows is as large a part of the tokens.
    later = slice(len(done_rows) // 3, None)
    np.testing.assert_allclose(
        np.array(done_rows)[later] / 400, np.array(done_tokens)[later] / done_tokens[-1], atol=0.1
    )
