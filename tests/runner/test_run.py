"""A whole run, from a file of rows to committed completions, with a pipeline that needs no model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchpipe
from batchpipe.commands.validate import shown_prompt, validate_job
from batchpipe.errors import InputError, InterruptedRunError, JobError, ModelError, OutputError, TooManyFailedError
from batchpipe.job import load_job
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.fake import FakePipeline
from batchpipe.placement.placement import Placement
from batchpipe.runner.run import SPARE_KV
from batchpipe.runner.start import run_job
from batchpipe.types import Capacity, StepResult
from tests.tiny_models import tiny_model

CAPACITY = Capacity(
    num_blocks=64, block_tokens=16, num_stages=2, max_batches=2, max_step_tokens=64, max_batch_sequences=8
)


def open_fake(placement: Placement) -> list[Pipeline]:
    return [FakePipeline(CAPACITY, placement.info.vocabulary_size, placement.info.eos_token_ids[0])]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def job_of(folder: Path, rows: list[Any], **sections: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = {
        "model": {"name": str(tiny_model("llama"))},
        "input": {"path": str(write_rows(folder / "rows.jsonl", rows))},
        "sampling": {"max_tokens": 12},
        "output": {"path": str(folder / "output"), "part_rows": 7},
    }
    for name, values in sections.items():
        job[name] = job.get(name, {}) | values
    return job


def good_rows(count: int) -> list[Any]:
    return [{"id": f"r{i}", "prompt": f"prompt number {i}", "topic": i % 3} for i in range(count)]


def test_every_row_is_there_once_with_its_columns_and_the_counts_add_up(tmp_path: Path) -> None:
    result = run_job(job_of(tmp_path, good_rows(40)), open_pipelines=open_fake)
    table = result.table()
    assert table["row_id"].to_pylist() == [f"r{i}" for i in range(40)]
    assert table["topic"].to_pylist() == [i % 3 for i in range(40)]
    assert set(table["status"].to_pylist()) == {"succeeded"}
    assert result.exit_code == 0
    assert (tmp_path / "output" / "_SUCCESS").exists()
    metrics = result.metrics
    assert metrics["rows_total"] == metrics["rows_succeeded"] == 40
    assert metrics["completion_tokens"] == sum(table["completion_tokens"].to_pylist())
    assert metrics["prompt_tokens"] == sum(table["prompt_tokens"].to_pylist())
    assert pq.read_table(tmp_path / "output" / "_metrics.parquet").num_rows == 1


def test_bad_rows_fail_with_their_codes_and_stop_no_other(tmp_path: Path) -> None:
    rows = [
        *good_rows(3),
        "{not json",
        "[1, 2]",
        {"id": "no prompt"},
        {"id": "r1", "prompt": "the id again"},
        {"id": "number", "prompt": 5},
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "x" * 400},
        {"id": "hot", "prompt": "hello", "options": {"temperature": -1}},
        {"id": "last", "prompt": "hello", "options": {"max_tokens": 2, "ignore_eos": True}},
    ]
    job = job_of(tmp_path, rows, input={"id_column": "id"}, sampling={"column": "options"})
    result = run_job(job, open_pipelines=open_fake)
    table = result.table()
    assert result.exit_code == 3
    assert table["error_code"].to_pylist() == [
        None, None, None, "invalid_json", "not_an_object", "missing_prompt", "duplicate_id", "wrong_type",
        "empty_prompt", "prompt_too_long", "invalid_sampling", None,
    ]  # fmt: skip
    assert table["completion_tokens"].to_pylist()[-1] == 2
    assert (result.metrics["rows_succeeded"], result.metrics["rows_failed"]) == (4, 8)


def test_samples_of_a_row_stand_together(tmp_path: Path) -> None:
    rows = [*good_rows(5), {"id": "bad"}]
    result = run_job(job_of(tmp_path, rows, sampling={"n": 3, "temperature": 1.0}), open_pipelines=open_fake)
    table = result.table()
    assert table["row_index"].to_pylist() == [i for i in range(6) for _ in range(3)]
    assert table["sample_index"].to_pylist() == [0, 1, 2] * 6
    assert result.metrics["rows_total"] == 6


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([10, 11], pa.int32()),
        "prompt": pa.array(["a", "b"], pa.large_string()),
        "when": pa.array([1, None], pa.timestamp("ns", "Europe/Paris")),
        "tags": pa.array([["x"], []], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    job = job_of(tmp_path, [], input={"path": str(tmp_path / "rows.parquet")})
    table = run_job(job, open_pipelines=open_fake).table()
    assert table["row_id"].to_pylist() == ["10", "11"]
    for name in ("when", "prompt"):
        assert table.schema.field(name).type == columns[name].type
        assert table[name].combine_chunks() == columns[name]


def test_a_finished_job_gives_its_result_again(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(4))
    first = run_job(job, open_pipelines=open_fake)

    def never(placement: Placement) -> list[Pipeline]:
        raise AssertionError("a finished job loads nothing")

    again = run_job(job, open_pipelines=never)
    assert again.exit_code == 0
    assert again.summary == first.summary
    assert again.metrics["run_id"] == first.metrics["run_id"]
    assert again.table() == first.table()


def test_a_finished_job_ends_as_it_ended_without_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, [*good_rows(3), "no json"])
    first = run_job(job, open_pipelines=open_fake)

    def never(opened: object) -> None:
        raise AssertionError("a finished job needs no tokenizer")

    monkeypatch.setattr("batchpipe.runner.prepare.complete", never)
    again = run_job(job)
    assert (again.exit_code, again.summary) == (first.exit_code, first.summary) and again.exit_code == 3


def test_what_cannot_run_leaves_no_output_behind(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(1), input={"chat_template": str(tmp_path / "wrong.jinja")})
    (tmp_path / "wrong.jinja").write_text("{% if %}")
    with pytest.raises(JobError, match="no prompt can be written"):
        run_job(job, open_pipelines=open_fake)
    assert not (tmp_path / "output").exists()


def test_another_job_is_refused_with_the_difference_and_fresh_moves_it_aside(tmp_path: Path) -> None:
    run_job(job_of(tmp_path, good_rows(4)), open_pipelines=open_fake)
    other = job_of(tmp_path, good_rows(4), sampling={"max_tokens": 3})
    with pytest.raises(OutputError, match=r"sampling\.max_tokens: 12 -> 3"):
        run_job(other, open_pipelines=open_fake)
    result = run_job(other, fresh=True, open_pipelines=open_fake)
    assert result.metrics["rows_total"] == 4
    assert len(list(tmp_path.glob("output.old-*"))) == 1


class Interrupting(FakePipeline):
    """Sends this process a signal when so many steps were collected."""

    after_steps = 6

    def collect(self) -> StepResult:
        self.after_steps -= 1
        if self.after_steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().collect()


def test_a_signal_commits_and_the_next_run_continues_with_the_same_texts(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(60))
    whole = run_job(job, {"output.path": str(tmp_path / "whole")}, open_pipelines=open_fake).table()

    def interrupting(placement: Placement) -> list[Pipeline]:
        return [Interrupting(CAPACITY, placement.info.vocabulary_size, placement.info.eos_token_ids[0])]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGTERM with \d+ of (about )?60 rows done") as stopped:
        run_job(job, open_pipelines=interrupting)
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.value.exit_code == 75
    assert stopped.value.summary is not None
    assert 0 < stopped.value.summary["rows_total"] < 60
    assert not (tmp_path / "output" / "_SUCCESS").exists()
    result = run_job(job, open_pipelines=open_fake)
    assert result.table().select(["row_id", "completion"]) == whole.select(["row_id", "completion"])
    assert result.metrics["rows_total"] == 60
    assert pq.read_table(tmp_path / "output" / "_metrics.parquet").num_rows == 2


def test_too_many_failed_rows_stop_the_job(tmp_path: Path) -> None:
    rows = [*good_rows(2), *[{"id": f"bad{i}"} for i in range(30)]]
    job = job_of(tmp_path, rows, output={"max_failed_fraction": 0.2})
    with pytest.raises(TooManyFailedError, match=r"max_failed_fraction = 0\.2") as stopped:
        run_job(job, open_pipelines=open_fake)
    assert stopped.value.exit_code == 4
    assert not (tmp_path / "output" / "_SUCCESS").exists()


def test_an_empty_input_succeeds_with_no_rows(tmp_path: Path) -> None:
    result = run_job(job_of(tmp_path, []), open_pipelines=open_fake)
    assert result.exit_code == 0
    assert result.table().num_rows == 0


def test_validate_lists_what_a_run_would_fail(tmp_path: Path) -> None:
    rows = [*good_rows(3), "{oops", {"id": "r0", "prompt": "again"}]
    job = job_of(tmp_path, rows, input={"id_column": "id"})
    report = validate_job(load_job(job))
    assert (report["rows"], report["failed"]) == (5, 2)
    assert report["failed_by_code"] == {"invalid_json": 1, "duplicate_id": 1}
    assert "row 4 (r0): duplicate_id" in report["problems"][1]


def test_validate_counts_all_and_lists_the_first_of_each_kind(tmp_path: Path) -> None:
    rows = [*["{oops"] * 9, *good_rows(2), *[{"id": f"e{i}", "prompt": ""} for i in range(3)]]
    report = validate_job(load_job(job_of(tmp_path, rows)))
    assert report["failed_by_code"] == {"invalid_json": 9, "empty_prompt": 3}
    codes = [problem.split(": ")[1] for problem in report["problems"]]
    assert codes == ["invalid_json"] * 6 + ["empty_prompt"] * 3
    assert report["problems"][5] == "and 4 more: invalid_json"
    assert report["first_prompt"] == "<|start|>user\nprompt number 0<|end|>\n<|start|>assistant\n"


def test_a_prompt_is_shown_line_by_line_and_cut(tmp_path: Path) -> None:
    assert shown_prompt("<s>a\nb\n") == "the first prompt, as the model gets it:\n  | <s>a\n  | b\n  | "
    assert shown_prompt("x" * 5000).endswith("x... (5,000 characters)")
    report = validate_job(load_job(job_of(tmp_path, ["{oops"])))
    assert report["first_prompt"] is None


def test_a_missing_model_is_told_before_the_output_is_touched(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        run_job(job_of(tmp_path, good_rows(1), model={"name": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "output").exists()


def test_the_command_ends_with_a_json_line_and_its_exit_code(tmp_path: Path) -> None:
    job = job_of(tmp_path, [*good_rows(6), {"id": "bad"}], model={"dtype": "float32"})
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "batchpipe", "run", str(path), "--set", "engine.max_batch_sequences=4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows_succeeded"], summary["rows_failed"]) == (6, 1)
    assert "7 of 7 rows" in done.stderr or "7 rows" in done.stderr


def test_from_python_with_a_real_model(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(5), model={"dtype": "float32"})
    result = batchpipe.run(job, overrides={"input.limit": 3})
    assert list(result.to_pandas()["row_id"]) == ["r0", "r1", "r2"]
    assert result.metrics["num_stages"] == 1


def test_a_terminated_command_says_how_far_it_came(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"row {i}"} for i in range(3000)]
    job = job_of(tmp_path, rows, sampling={"max_tokens": 100, "ignore_eos": True})
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job))
    process = subprocess.Popen(
        [sys.executable, "-m", "batchpipe", "run", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "rows" in line:  # the first progress line: it runs
            break
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "stopped by SIGUSR1" in stderr
    assert json.loads(stdout)["rows_failed"] == 0


def test_a_column_named_like_ours_is_refused_by_validate_too(tmp_path: Path) -> None:
    job = job_of(tmp_path, [{"id": "a", "prompt": "b", "status": "mine"}])
    with pytest.raises(JobError, match="status"):
        validate_job(load_job(job))
    assert run_job(job, {"output.columns": "none"}, open_pipelines=open_fake).exit_code == 0


def test_the_output_of_a_job_is_the_input_of_the_next(tmp_path: Path) -> None:
    run_job(job_of(tmp_path, good_rows(20)), open_pipelines=open_fake)
    first = tmp_path / "output"
    job = job_of(tmp_path, [], input={"path": str(first), "prompt_column": "completion"})
    job["output"] = {"path": str(tmp_path / "next")}
    with pytest.raises(JobError, match="'row_id' has the name .* write `prefix: input_` under `output`"):
        run_job(job, open_pipelines=open_fake)
    job["output"]["prefix"] = "input_"
    table = run_job(job, open_pipelines=open_fake).table()
    assert table["row_id"].to_pylist() == table["input_row_id"].to_pylist()
    before = {row["id"]: row for row in pq.read_table(first / "completions").to_pylist()}
    after = {row["id"]: row for row in table.to_pylist()}
    assert sorted(after) == sorted(before) == sorted(f"r{i}" for i in range(20))
    for row_id, row in after.items():
        assert (row["input_completion"], row["topic"]) == (before[row_id]["completion"], before[row_id]["topic"])
    third = job | {
        "input": job["input"] | {"path": str(tmp_path / "next")},
        "output": {"path": str(tmp_path / "third")},
    }
    third["output"] |= {"prefix": "second_"}
    assert {"input_completion", "second_completion"} < set(
        run_job(third, open_pipelines=open_fake).table().column_names
    )


def test_an_output_that_is_not_finished_is_no_input(tmp_path: Path) -> None:
    run_job(job_of(tmp_path, good_rows(3)), open_pipelines=open_fake)
    (tmp_path / "output" / "_SUCCESS").unlink()
    job = job_of(tmp_path, [], input={"path": str(tmp_path / "output")}, output={"path": str(tmp_path / "next")})
    with pytest.raises(InputError, match="is the output of a job that is not finished"):
        run_job(job, open_pipelines=open_fake)


def test_a_run_says_what_runs_where_and_which_rows_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(tmp_path, [*good_rows(3), "no json", {"id": "x"}, {"id": "y"}], engine={"device": "cpu"})
    run_job(job, open_pipelines=open_fake)
    said = [line.partition("batchpipe: ")[2] for line in capsys.readouterr().err.splitlines()]
    start, ready, *_, end = [line for line in said if line]
    assert start.startswith(f"{tiny_model('llama')} (float32) on ")
    assert start.endswith(f"; writing to {tmp_path / 'output'}")
    assert re.fullmatch(r"ready after \d+\.\d s, with KV for 1,024 tokens", ready)
    assert end.startswith("failed rows: 2 missing_prompt, 1 invalid_json; error_message says why")
    assert "was moved to" not in caplog.text
    run_job(job, fresh=True, open_pipelines=open_fake)
    (moved,) = tmp_path.glob("output.old-*")
    assert f"the old output was moved to {moved}" in caplog.text


def test_a_parquet_input_and_a_continued_run_are_told_with_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.Table.from_pylist(good_rows(5)), tmp_path / "rows.parquet")
    job = job_of(tmp_path, [], input={"path": str(tmp_path / "rows.parquet"), "limit": 2})
    run_job(job, open_pipelines=open_fake)
    assert ", 2 rows; writing to " in capsys.readouterr().err
    run_job(job, {"input.limit": 5}, extend=True, open_pipelines=open_fake)
    assert ", 5 rows, 2 rows done before; writing to " in capsys.readouterr().err


def test_an_empty_input_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(job_of(tmp_path, []), open_pipelines=open_fake)
    assert "batchpipe: the input holds no rows; the output is an empty table\n" in capsys.readouterr().err


@pytest.mark.parametrize(("sampling", "warns"), [({"n": 2}, True), ({"n": 2, "temperature": 0.5}, False), ({}, False)])
def test_equal_samples_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sampling: dict[str, Any], warns: bool
) -> None:
    validate_job(load_job(job_of(tmp_path, good_rows(1), sampling=sampling)))
    assert ("the samples of a row are all the same" in caplog.text) == warns


def test_kv_is_made_for_the_rows_that_were_read(tmp_path: Path) -> None:
    capacities: list[Capacity] = []

    def opening(placement: Placement) -> list[Pipeline]:
        capacities.append(placement.capacity_of(placement.stages))
        capacities.append(placement.capacity)
        return open_fake(placement)

    job = job_of(
        tmp_path, [*good_rows(3), "no json"], sampling={"n": 2, "temperature": 1.0}, engine={"block_tokens": 4}
    )
    table = run_job(job, open_pipelines=opening).table()
    longest_tokens = [tokens + 12 for tokens in table.column("prompt_tokens").to_pylist() if tokens is not None]
    needed_blocks = sum(-(-tokens // 4) for tokens in longest_tokens)
    assert len(longest_tokens) == 6 and capacities[0].num_blocks == SPARE_KV * needed_blocks + 1
    assert capacities[0].num_blocks < capacities[1].num_blocks
