"""`batchpipe export`, from requests to answers and back through the `openai` package."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from openai.types import Completion
from openai.types.batch_error import BatchError
from openai.types.chat import ChatCompletion

import batchpipe
from batchpipe.cli import main
from batchpipe.commands.export import export_command
from batchpipe.errors import OutputError
from batchpipe.runner.start import run_job
from tests.read.test_read_openai_batch import COMPLETIONS, request
from tests.runner.test_run import good_rows, job_of, open_fake


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def requests_with_bad_ones() -> list[Any]:
    lines: list[Any] = [request(f"q{i}", COMPLETIONS if i % 3 == 0 else "/v1/chat/completions") for i in range(200)]
    for i in range(4):
        lines[7 + 40 * i] = '{"custom_id": "torn'
        lines[9 + 40 * i] = request(f"q{i}")  # an id that stands in an earlier line
        lines[11 + 40 * i] = request(f"q{11 + 40 * i}", "/v1/embeddings")
        lines[13 + 40 * i] = request(f"q{13 + 40 * i}", model="large")
        lines[15 + 40 * i]["body"]["tools"] = [{"type": "function"}]
    return lines


def test_twenty_bad_lines_of_two_hundred_are_twenty_errors(tmp_path: Path) -> None:
    lines = requests_with_bad_ones()
    result = run_job(job_of(tmp_path, lines), open_pipelines=open_fake)
    assert (result.metrics["rows_succeeded"], result.metrics["rows_failed"], result.exit_code) == (180, 20, 3)
    summary = export_command(result.path, "openai-batch")
    assert (summary["num_results"], summary["num_errors"], summary["finished"]) == (180, 20, True)
    results, errors = lines_of(summary["results"]), lines_of(summary["errors"])
    assert Counter(BatchError.model_validate(line["error"]).code for line in errors) == {
        "invalid_json_line": 4,
        "duplicate_custom_id": 4,
        "url_mismatch": 4,
        "model_mismatch": 4,
        "unsupported_parameter": 4,
    }
    bad = {place + 40 * i for place in (7, 9, 11, 13, 15) for i in range(4)}
    assert [line["custom_id"] for line in results] == [f"q{i}" for i in range(200) if i not in bad]
    for line in results:
        is_chat = int(line["custom_id"][1:]) % 3 != 0
        answer: Any = (ChatCompletion if is_chat else Completion).model_validate(line["response"]["body"], strict=True)
        assert answer.usage.completion_tokens <= 4


def test_rows_of_any_job_are_json_lines_and_csv(tmp_path: Path) -> None:
    result = run_job(job_of(tmp_path, [*good_rows(30), {"id": "bad"}]), open_pipelines=open_fake)
    table = result.table().to_pylist()
    as_json = export_command(result.path, "jsonl")
    assert lines_of(as_json["results"]) == table[:30]
    assert lines_of(as_json["errors"]) == table[30:]
    as_csv = export_command(result.path, "csv")
    with Path(as_csv["results"]).open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["completion"] for row in cells] == [row["completion"] for row in table[:30]]
    assert list(cells[0]) == list(table[0]) and cells[4]["topic"] == "1"
    assert pq.read_table(result.path / "completions").num_rows == 31  # where exports are not looked for
    assert lines_of(export_command(result.path, "jsonl")["errors"]) == table[30:]  # in place of the earlier one


def test_exported_json_lines_are_an_input(tmp_path: Path) -> None:
    result = run_job(job_of(tmp_path, good_rows(5)), open_pipelines=open_fake)
    path = export_command(result.path, "jsonl", tmp_path / "again")["results"]
    keys = {"path": path, "id_column": "row_id", "prompt_column": "completion"}
    job = job_of(tmp_path, [], input=keys, output={"path": str(tmp_path / "second"), "columns": ["topic"]})
    assert run_job(job, open_pipelines=open_fake).table()["row_id"].to_pylist() == [f"r{i}" for i in range(5)]


def test_an_unfinished_job_is_exported_as_far_as_it_came(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run_job(job_of(tmp_path, good_rows(20)), open_pipelines=open_fake)
    (result.path / "_SUCCESS").unlink()
    summary = export_command(result.path, "openai-batch")
    assert (summary["num_results"], summary["finished"]) == (20, False)
    assert "the job is not finished" in caplog.text


def test_completions_are_no_place_for_an_export(tmp_path: Path) -> None:
    result = run_job(job_of(tmp_path, good_rows(2)), open_pipelines=open_fake)
    with pytest.raises(OutputError, match="readers of the completions would take it for one"):
        export_command(result.path, "jsonl", result.path / "completions" / "x")


def test_the_command_with_a_real_model_and_log_probabilities(tmp_path: Path) -> None:
    chat, plain = request("a"), request("b", COMPLETIONS)
    chat["body"] |= {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1, "ignore_eos": True}
    plain["body"] |= {"logprobs": 3, "ignore_eos": True}
    job = job_of(tmp_path, [chat, plain, request("c")], model={"dtype": "float32"}, output={"columns": "none"})
    job["input"]["format"] = "openai-batch"
    result = batchpipe.run(job)
    done = CliRunner().invoke(
        main, ["export", str(result.path), "--format", "openai-batch", "--output", str(tmp_path / "answers")]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["results"] == str(tmp_path / "answers" / "results.jsonl")
    first, second, third = (line["response"]["body"] for line in lines_of(summary["results"]))
    talk = ChatCompletion.model_validate(first, strict=True)
    assert len(talk.choices) == 2
    for choice in talk.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 4
    completion = Completion.model_validate(second, strict=True)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and len(logprobs.tokens) == 4
    assert ChatCompletion.model_validate(third, strict=True).choices[0].logprobs is None
    again = CliRunner().invoke(
        main, ["export", str(result.path), "--format", "openai-batch", "--output", str(tmp_path / "answers")]
    )
    assert again.exit_code == 8 and "exists already" in again.stderr
