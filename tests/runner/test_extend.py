"""An input that only grew: `extend` runs its new rows; anything else is refused, with the file that changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchpipe.errors import JobError, OutputError
from batchpipe.runner.result import Result
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of, open_fake, write_rows


def text_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(job: dict[str, Any], **how: bool) -> Result:
    return run_job(job, open_pipelines=open_fake, **how)  # type: ignore[arg-type]


def rows_of(result: Result) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result.table().drop(["predicted_tokens"]).to_pylist()
    return rows


def test_new_lines_run_and_old_rows_are_kept(tmp_path: Path) -> None:
    rows = good_rows(30)
    job = job_of(tmp_path, rows[:10])
    first = rows_of(run(job))
    path = tmp_path / "rows.jsonl"
    old_bytes = path.stat().st_size
    write_rows(path, rows)
    grew = rf"rows\.jsonl grew from {old_bytes:,} to {path.stat().st_size:,} bytes\n.*--extend"
    with pytest.raises(OutputError, match=grew):
        run(job)
    result = run(job, extend=True)
    assert result.metrics["rows_total"] == 30
    assert rows_of(result)[:10] == first
    assert result.metrics["completion_tokens"] < sum(row["completion_tokens"] for row in rows_of(result))
    whole = run(job | {"output": {"path": str(tmp_path / "whole")}})
    assert rows_of(result) == rows_of(whole)
    assert run(job).metrics["run_id"] == result.metrics["run_id"]  # it is the folder's job now
    write_rows(path, good_rows(31))
    assert run(job, extend=True).metrics["rows_total"] == 31


def test_a_last_line_without_an_end_may_be_followed_by_others(tmp_path: Path) -> None:
    rows = good_rows(4)
    job = job_of(tmp_path, rows)
    path = tmp_path / "rows.jsonl"
    path.write_text(text_of(rows[:2]).rstrip("\n"))
    run(job)
    path.write_text(text_of(rows))
    assert run(job, extend=True).metrics["rows_total"] == 4


def test_new_files_run_behind_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, start in (("b", 0), ("c", 3)):
        pq.write_table(pa.Table.from_pylist(good_rows(6)[start : start + 3]), tmp_path / "in" / f"{name}.parquet")
    job = job_of(tmp_path, [], input={"path": str(tmp_path / "in")})
    first = rows_of(run(job))
    extra = pa.Table.from_pylist(good_rows(9)[6:])
    pq.write_table(extra, tmp_path / "in" / "d.parquet")
    with pytest.raises(OutputError, match=r"holds the rows of a smaller input:\n  input\.path: d\.parquet is new\n"):
        run(job)
    result = run(job, extend=True)
    assert rows_of(result)[:6] == first and len(rows_of(result)) == 9
    pq.write_table(extra.slice(1).append_column("more", pa.array([1, 2])).drop("more"), tmp_path / "in" / "a.parquet")
    with pytest.raises(
        OutputError, match=r"a\.parquet is new\n.*rows of new files would stand before those of d\.parquet"
    ):
        run(job, extend=True)


def test_a_raised_limit_runs_more_rows_and_a_lowered_one_is_another_job(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(9), input={"limit": 4})
    first = rows_of(run(job))
    more = job_of(tmp_path, good_rows(9), input={"limit": 7})
    with pytest.raises(OutputError, match=r"input\.limit: 4 -> 7\n.*--extend"):
        run(more)
    assert rows_of(run(more, extend=True))[:4] == first
    assert len(rows_of(run(job_of(tmp_path, good_rows(9)), extend=True))) == 9
    for fewer in (job, more):
        with pytest.raises(OutputError, match=r"belongs to another job:\n  input\.limit: null -> \d\n"):
            run(fewer, extend=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("prompt number 1", "prompt number x"), r"a\.jsonl changed\n"),
        (lambda text: text[:-20], r"a\.jsonl shrank from \d+ to \d+ bytes\n"),
        (
            lambda text: text + text_of(good_rows(1)),
            r"a\.jsonl grew .*, and rows of other files stand behind its own\n",
        ),
        (None, r"a\.jsonl is gone\n"),
    ],
)
def test_any_other_change_is_refused_with_the_file(tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_rows(folder / "a.jsonl", good_rows(3))
    write_rows(folder / "b.jsonl", [{"id": "b", "prompt": "b", "topic": 1}])
    job = job_of(tmp_path, [], input={"path": str(folder)})
    run(job)
    if change is None:
        (folder / "a.jsonl").unlink()
    else:
        (folder / "a.jsonl").write_text(change((folder / "a.jsonl").read_text()))
    for extend in (False, True):
        with pytest.raises(OutputError, match=rf"belongs to another job:\n  input\.path: {message}Choose another"):
            run(job, extend=extend)


def test_a_line_that_was_continued_is_no_new_row(tmp_path: Path) -> None:
    job = job_of(tmp_path, [])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}')
    run(job)
    path.write_text('{"id": "a", "prompt": "x"}   {"id": "b", "prompt": "x"}\n')
    with pytest.raises(OutputError, match=r"grew from 26 to 56 bytes, and not by whole lines"):
        run(job, extend=True)


def test_columns_of_another_type_are_refused_before_anything_changes(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(2))
    first = run(job)
    write_rows(tmp_path / "rows.jsonl", [*good_rows(2), {"id": "x", "prompt": "x", "topic": "text", "more": 1}])
    with pytest.raises(OutputError, match="has other columns than the input has now"):
        run(job, extend=True)
    write_rows(tmp_path / "rows.jsonl", good_rows(2))
    assert run(job).metrics["run_id"] == first.metrics["run_id"]


def test_another_setting_beside_a_larger_input_is_another_job(tmp_path: Path) -> None:
    run(job_of(tmp_path, good_rows(2)))
    with pytest.raises(OutputError, match=r"sampling\.seed: 0 -> 1\n  input\.path: rows\.jsonl grew"):
        run(job_of(tmp_path, good_rows(3), sampling={"seed": 1}), extend=True)


def test_parts_of_before_are_known_even_if_their_records_are_lost(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(10))
    run(job)
    write_rows(tmp_path / "rows.jsonl", good_rows(20))
    whole = rows_of(run(job, extend=True))
    (tmp_path / "output" / "_batchpipe" / "commits.jsonl").unlink()
    assert rows_of(run(job)) == whole


def test_fresh_goes_with_neither(tmp_path: Path) -> None:
    for how in ({"extend": True}, {"retry_failed": True}):
        with pytest.raises(JobError, match="--fresh starts over"):
            run(job_of(tmp_path, []), fresh=True, **how)


def test_failed_rows_run_again(tmp_path: Path) -> None:
    job = job_of(tmp_path, [*good_rows(8), "no json"], engine={"num_stages": 1})
    first = run(job)
    assert first.exit_code == 3
    again = run(job, retry_failed=True)
    assert (again.exit_code, again.metrics["rows_failed"], again.metrics["completion_tokens"]) == (3, 1, 0)
    assert rows_of(again) == rows_of(first) and again.metrics["run_id"] != first.metrics["run_id"]
