from pathlib import Path

import pyarrow as pa
import pytest

from batchpipe.commands.status import describe_status, status_of
from batchpipe.errors import OutputError
from batchpipe.report.metrics import append_metrics, read_metrics
from batchpipe.report.note import NoteWriter
from batchpipe.report.progress import Reading
from batchpipe.runner.result import Result
from batchpipe.types import Carried, Outcome, RowKey
from batchpipe.write.place import open_place
from batchpipe.write.schema import completions_schema
from batchpipe.write.writer import CompletionWriter
from tests.report.run_metrics_case import RUN_METRICS
from tests.write.completion_cases import SCHEMA, open_folder, outcomes_of, run_job, sample


def test_status_of_a_finished_output(tmp_path: Path) -> None:
    run_job(tmp_path, 25)
    append_metrics(open_place(tmp_path), RUN_METRICS)
    status = status_of(tmp_path)
    assert status.pop("last_run")["run_id"] == "run-1"
    assert status.pop("bytes") == sum(part.stat().st_size for part in (tmp_path / "completions").iterdir())
    assert status == {
        "path": str(tmp_path),
        "finished": True,
        "running": None,
        "rows_total": 25,
        "rows_total_is_estimate": False,
        "rows_done": 25,
        "rows_succeeded": 21,
        "rows_failed": 4,
        "rows_canceled": 0,
        "rows_committed": 25,
        "failed_by_code": {"empty_prompt": 4},
        "prompt_tokens": 125,
        "completion_tokens": 63,
        "output_tokens_per_second": None,
        "seconds_left": None,
        "parts": 3,
        "parts_missing": [],
    }


def test_status_during_a_run_says_who_runs_it_and_does_not_disturb_it(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder, CompletionWriter(folder, part_rows=10) as writer:
        status = status_of(tmp_path)
        assert status["running"]["pid"] > 0 and status["rows_done"] == 0 and status["last_run"] is None
        writer.write(outcomes_of(range(4)))
        status = status_of(tmp_path)
        assert status["running"] is not None
        assert (status["rows_done"], status["rows_failed"], status["rows_committed"]) == (4, 1, 0)
        assert status["completion_tokens"] == 9 and status["rows_total"] is None
        writer.write(outcomes_of(range(4, 12)))
        assert status_of(tmp_path)["rows_done"] == 12
        writer.write(outcomes_of(range(12, 13)))
        writer.finish(13)
    assert status_of(tmp_path)["running"] is None and status_of(tmp_path)["finished"]


def test_a_run_that_was_killed_says_what_its_log_holds_and_how_many_rows_there_are(tmp_path: Path) -> None:
    def reading() -> Reading:
        return Reading(8, 2, 40, 18, 0.5)

    seconds = iter([0.0, 0.0, 0.0, 0.0, 20.0])
    with pytest.raises(KeyboardInterrupt), open_folder(tmp_path) as folder:
        writer = CompletionWriter(folder, part_rows=100)  # never left, as by a killed process
        writer.write(outcomes_of(range(8)))
        with NoteWriter(folder.state, lambda: (16, True), reading, lambda: next(seconds)) as note:
            note.tick()
            raise KeyboardInterrupt
    status = status_of(tmp_path)
    assert (status["finished"], status["running"], status["rows_done"], status["rows_total"]) == (False, None, 8, 16)
    assert status["rows_total_is_estimate"] and status["output_tokens_per_second"] is None
    assert describe_status(status).splitlines() == [
        f"{tmp_path}: not finished, and no process is at work; `batchpipe run` goes on",
        "  8 of about 16 (50.0%) rows done: 6 succeeded, 2 failed",
        "  failed: 2 empty_prompt",
        "  their tokens: 40 in, 18 out",
        "  0 of them in 0 parts, 0.0 MiB",
    ]


def test_status_of_a_run_at_work_has_its_speed_and_the_time_left(tmp_path: Path) -> None:
    readings = iter([Reading(0, 0, 0, 0, 0.0), Reading(8, 2, 40, 60, 0.25), Reading(8, 2, 40, 60, 0.25)])
    now_seconds = [0.0]
    with (
        open_folder(tmp_path) as folder,
        NoteWriter(folder.state, lambda: (32, False), lambda: next(readings), lambda: now_seconds[0]) as note,
    ):
        note.tick()
        now_seconds[0] = 4.0
        note.tick()  # none is due
        assert status_of(tmp_path)["seconds_left"] is None
        now_seconds[0] = 5.0
        note.tick()
        status = status_of(tmp_path)
        assert (status["rows_total"], status["output_tokens_per_second"], status["seconds_left"]) == (32, 12.0, 15.0)
        assert "; now 12 out/s, 0:00:15 left" in describe_status(status)


def test_a_part_that_is_gone_or_changed_is_named(tmp_path: Path) -> None:
    run_job(tmp_path, 25)
    (tmp_path / "completions" / "part-00001.parquet").unlink()
    (tmp_path / "completions" / "part-00002.parquet").write_bytes(b"PAR1")
    status = status_of(tmp_path)
    assert not status["finished"]
    gone, changed = status["parts_missing"]
    assert "part-00001.parquet: is missing; put it back" in gone
    assert "part-00002.parquet: has 4 bytes of" in changed
    assert describe_status(status).splitlines()[0] == f"{tmp_path}: damaged"
    assert describe_status(status).splitlines()[-2:] == [f"  {gone}", f"  {changed}"]


def test_status_of_what_is_no_output_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OutputError, match="is no output folder of batchpipe"):
            status_of(path)


def test_the_table_stands_in_the_order_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "topic=none"  # must not become a column
    with open_folder(path) as folder, CompletionWriter(folder, part_rows=4) as writer:
        writer.write(outcomes_of([5, 1, 3], num_samples=2))
        writer.write(outcomes_of([4, 0, 2], num_samples=2))
        writer.finish(6)
    append_metrics(open_place(path), RUN_METRICS)
    result = Result(open_place(path), read_metrics(open_place(path))[-1], 3)
    table = result.table()
    assert table.schema.equals(SCHEMA)
    keys = list(zip(table["row_index"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    assert keys == [(row, sample_index) for row in range(6) for sample_index in range(2)]
    assert result.to_pandas()["topic"].tolist() == [f"topic {row}" for row in range(6) for _ in range(2)]
    assert result.summary == {
        "output": str(path),
        "rows_total": 10,
        "rows_succeeded": 8,
        "rows_failed": 2,
        "rows_canceled": 0,
        "prompt_tokens": 100,
        "completion_tokens": 200,
        "wall_seconds": 60.0,
        "output_tokens_per_second": 4.0,
        "total_tokens_per_second": 6.0,
    }


def test_the_table_holds_carried_views_too(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"view": pa.array(["x", "y"], pa.string_view())})
    schema = completions_schema(batch.schema, with_logprobs=False)
    with open_folder(tmp_path, schema=schema) as folder, CompletionWriter(folder, part_rows=1) as writer:
        writer.write([Outcome(RowKey(i, str(i), Carried(batch, i)), 1, None, (sample(),)) for i in (1, 0)])
        writer.finish(2)
    table = Result(open_place(tmp_path), {}, 0).table()
    assert table["view"].to_pylist() == ["x", "y"] and table.schema.field("view").type == pa.string_view()


def test_an_output_without_completions_has_no_table(tmp_path: Path) -> None:
    open_folder(tmp_path).__exit__(None, None, None)
    with pytest.raises(OutputError, match="holds no completions yet"):
        Result(open_place(tmp_path), {}, 75).table()


def test_a_result_is_shown_in_a_line(tmp_path: Path) -> None:
    metrics = {"rows_total": 1200, "rows_failed": 3, "output_tokens_per_second": 98.7}
    assert (
        repr(Result(open_place(tmp_path), metrics, 3))
        == f"<Result {tmp_path}: 1,200 rows, 3 failed, 99 output tokens/s>"
    )
    assert "failed" not in repr(Result(open_place(tmp_path), metrics | {"rows_failed": 0}, 0))
