"""A whole run over OpenAI's requests: each line's body rules its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchpipe.commands.validate import validate_job
from batchpipe.errors import JobError
from batchpipe.job import load_job
from batchpipe.runner.start import run_job
from tests.read.test_read_openai_batch import COMPLETIONS, request
from tests.runner.test_run import job_of, open_fake


def with_body(name: str, **keys: Any) -> dict[str, Any]:
    line = request(name)
    line["body"] |= keys
    return line


def test_each_body_rules_its_row_and_the_job_the_rest(tmp_path: Path) -> None:
    lines = [
        with_body("a", max_tokens=2, ignore_eos=True),
        with_body("b", max_tokens=None, ignore_eos=True),
        with_body("c", max_tokens=1, n=2, temperature=1, logprobs=True),
        request("d", COMPLETIONS),
        with_body("e", temperature=-1),
    ]
    result = run_job(job_of(tmp_path, lines, sampling={"max_tokens": 5}), open_pipelines=open_fake)
    table = result.table()
    assert table["row_id"].to_pylist() == ["a", "b", "c", "c", "d", "e"]
    assert table["completion_tokens"].to_pylist()[:4] == [2, 5, 1, 1]
    assert table["error_code"].to_pylist() == [None] * 5 + ["invalid_sampling"]
    prompt_tokens = dict(zip(table["row_id"].to_pylist(), table["prompt_tokens"].to_pylist(), strict=True))
    assert prompt_tokens["a"] > prompt_tokens["d"]  # the template is around a chat alone
    assert result.exit_code == 3
    assert run_job(job_of(tmp_path, lines, sampling={"max_tokens": 5})).table() == table  # it is finished


def test_validate_tells_what_a_run_would_fail(tmp_path: Path) -> None:
    report = validate_job(load_job(job_of(tmp_path, [request("a"), request("a"), request("b", model="other")])))
    assert report["failed_by_code"] == {"duplicate_custom_id": 1, "model_mismatch": 1}


def test_a_column_of_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"sampling\.column: the input's requests bring their own settings"):
        run_job(job_of(tmp_path, [request("a")], sampling={"column": "body"}))
