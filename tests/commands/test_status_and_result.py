from pathlib import Path

import pyarrow as pa
import pytest

from batchpipe.commands.status import status_of
from batchpipe.errors import OutputError
from batchpipe.report.metrics import append_metrics, read_metrics
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
        "rows_done": 25,
        "rows_succeeded": 21,
        "rows_failed": 4,
        "rows_canceled": 0,
        "parts": 3,
    }


def test_status_during_a_run_says_who_runs_it_and_does_not_disturb_it(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder, CompletionWriter(folder, part_rows=10) as writer:
        status = status_of(tmp_path)
        assert status["running"]["pid"] > 0 and status["rows_done"] == 0 and status["last_run"] is None
        writer.write(outcomes_of(range(4)))
        assert status_of(tmp_path)["running"] is not None
        writer.finish(4)
    assert status_of(tmp_path)["running"] is None and status_of(tmp_path)["finished"]


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
