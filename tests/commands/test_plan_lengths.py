"""The lengths that a plan draws: they have the curves' mean, and the interval is as wide as little is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchpipe.commands.plan_lengths import Lengths
from batchpipe.job import load_job
from batchpipe.runner.prepare import prepare
from batchpipe.runner.start import run_job
from batchpipe.types import Request
from tests.runner.test_run import good_rows, job_of, open_fake

MAX_TOKENS = 40


def lengths_of(folder: Path, num_rows: int, **sections: dict[str, Any]) -> Lengths:
    job = job_of(folder, good_rows(num_rows), sampling={"max_tokens": MAX_TOKENS}, **sections)
    prepared = prepare(load_job(job))
    requests = [item for item in prepared.requests() if isinstance(item, Request)]
    assert len(requests) == num_rows
    return Lengths(prepared, requests)


def test_drawn_lengths_add_up_to_what_is_expected(tmp_path: Path) -> None:
    lengths = lengths_of(tmp_path, 200)
    predictor = lengths.predictor()
    assert predictor is not None
    none = np.zeros(0, np.int32)
    classes = predictor.classify([request.prompt_token_ids for request in lengths.requests])
    expected = predictor.survival(none, none).expected_tokens(classes, np.full(200, MAX_TOKENS, np.int32))
    drawn = lengths.of(range(200))
    assert drawn.sum() == pytest.approx(expected.sum(), rel=0.02)
    assert drawn.min() >= 1 and drawn.max() == MAX_TOKENS


def test_the_ends_of_the_interval_are_shorter_and_longer(tmp_path: Path) -> None:
    lengths = lengths_of(tmp_path, 200)
    low, high = lengths.scales
    assert low < 1 < high
    shortest, usual, longest = (lengths.of(range(200), scale) for scale in (low, 1.0, high))
    assert (shortest <= usual).all() and (usual <= longest).all()
    assert shortest.sum() < 0.9 * usual.sum() and longest.sum() > 1.02 * usual.sum()
    assert (longest == MAX_TOKENS).sum() > (usual == MAX_TOKENS).sum() > (shortest == MAX_TOKENS).sum()


def test_rows_done_make_the_interval_narrower_and_few_rows_make_it_wider(tmp_path: Path) -> None:
    few, many = lengths_of(tmp_path, 3).scales, lengths_of(tmp_path, 120).scales
    assert few[1] > many[1]
    job = job_of(tmp_path, good_rows(120), sampling={"max_tokens": MAX_TOKENS})
    run_job(job, open_pipelines=open_fake)
    done = lengths_of(tmp_path, 120).scales
    assert done[1] < many[1] ** 0.5


@pytest.mark.parametrize("sections", [{"predict": {"method": "none"}}, {"sampling": {"ignore_eos": True}}])
def test_rows_that_all_reach_their_limit_leave_nothing_open(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections["sampling"] = {"max_tokens": MAX_TOKENS} | sections.get("sampling", {})
    prepared = prepare(load_job(job_of(tmp_path, good_rows(20), **sections)))
    lengths = Lengths(prepared, [item for item in prepared.requests() if isinstance(item, Request)])
    assert lengths.scales == (1.0, 1.0)
    assert set(lengths.of(range(20)).tolist()) == {MAX_TOKENS}
