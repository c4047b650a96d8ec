from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchpipe.errors import OutputError
from batchpipe.report.meter import Meter
from batchpipe.report.metrics import METRICS_SCHEMA, append_metrics, read_metrics
from batchpipe.types import LinkUse, Outcome, RowStatus, StepResult
from batchpipe.write.place import open_place
from tests.report.run_metrics_case import RUN_METRICS
from tests.write.completion_cases import outcomes_of, run_job, sample

NO_TOKENS = np.empty(0, np.int32)


def test_columns_are_those_of_the_contract() -> None:
    assert METRICS_SCHEMA.names == [
        *("run_id", "job_name", "identity_sha256", "model", "revision", "versions", "device_names"),
        *("started_at", "ended_at", "load_seconds", "generate_seconds", "wall_seconds"),
        *("rows_total", "rows_succeeded", "rows_failed", "rows_canceled", "prompt_tokens", "completion_tokens"),
        *("output_tokens_per_second", "total_tokens_per_second", "num_stages", "num_replicas", "stage_utilization"),
        *("phase_switches", "preemptions", "recomputed_tokens", "reused_tokens"),
        *("peak_device_blocks", "peak_host_blocks"),
        *("host_to_device_bytes", "device_to_host_bytes", "stall_seconds", "kv_faults"),
        *("predictor_mean_absolute_error_tokens", "predictor_sum_error", "planner_seconds"),
        "timeline",
    ]


def test_each_run_adds_a_row_of_fixed_types(tmp_path: Path) -> None:
    for run_id in ("first", "second"):
        append_metrics(open_place(tmp_path), replace(RUN_METRICS, run_id=run_id))
    assert pq.read_schema(tmp_path / "_metrics.parquet").equals(METRICS_SCHEMA)
    first, second = read_metrics(open_place(tmp_path))
    assert (first["run_id"], second["run_id"]) == ("first", "second")
    assert first["versions"] == {"batchpipe": "0.1.0", "torch": "2.13.0"}
    assert first["stage_utilization"] == [0.5, 0.75] and first["revision"] is None
    assert first["started_at"] == datetime(2025, 1, 1, tzinfo=UTC)
    assert [path.name for path in tmp_path.iterdir()] == ["_metrics.parquet"]


def test_runs_of_an_older_version_stay_with_nulls_for_what_it_did_not_know(tmp_path: Path) -> None:
    append_metrics(open_place(tmp_path), RUN_METRICS)
    path = tmp_path / "_metrics.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kv_faults", "reused_tokens"]), path)
    append_metrics(open_place(tmp_path), RUN_METRICS)
    old, new = read_metrics(open_place(tmp_path))
    assert (old["kv_faults"], old["stall_seconds"], new["kv_faults"]) == (None, 0.0, 0)
    assert pq.read_schema(path).equals(METRICS_SCHEMA)


def test_metrics_under_their_old_name_are_read_and_move_to_the_new_one(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    append_metrics(place, RUN_METRICS)
    (tmp_path / "_metrics.parquet").rename(tmp_path / "metrics.parquet")
    assert [run["run_id"] for run in read_metrics(place)] == ["run-1"]
    append_metrics(place, replace(RUN_METRICS, run_id="second"))
    assert [run["run_id"] for run in read_metrics(place)] == ["run-1", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["_metrics.parquet"]


def test_readers_of_the_output_folder_find_its_rows_alone(tmp_path: Path) -> None:
    run_job(tmp_path, 25)
    append_metrics(open_place(tmp_path), RUN_METRICS)
    (tmp_path / "_export").mkdir()
    (tmp_path / "_export" / "results.jsonl").write_text("{}")
    for read in (pd.read_parquet, lambda path: pq.read_table(path).to_pandas()):
        assert sorted(read(tmp_path)["row_index"]) == list(range(25))


def test_rows_always_add_up() -> None:
    with pytest.raises(AssertionError, match="11 rows, but 10 accounted for"):
        replace(RUN_METRICS, rows_total=11)


def test_a_folder_without_metrics_has_none_and_damaged_ones_are_named(tmp_path: Path) -> None:
    assert read_metrics(open_place(tmp_path)) == []
    (tmp_path / "_metrics.parquet").write_text("not parquet")
    with pytest.raises(OutputError, match=r"_metrics\.parquet: cannot be read as metrics"):
        append_metrics(open_place(tmp_path), RUN_METRICS)
    pq.write_table(pa.table({"other": [1]}), tmp_path / "_metrics.parquet")
    with pytest.raises(OutputError, match=r"_metrics\.parquet: cannot be read as metrics"):
        read_metrics(open_place(tmp_path))


def step_result(*stage_seconds: float) -> StepResult:
    return StepResult(step_id=0, token_ids=NO_TOKENS, logprobs={}, compute_seconds=stage_seconds)


def test_the_meter_sums_tokens_and_stage_time() -> None:
    meter = Meter(num_stages=2)
    meter.add_step(step_result(1.0, 0.5), num_prompt_tokens=100, num_output_tokens=10)
    meter.add_step(step_result(2.0, 0.5), num_prompt_tokens=0, num_output_tokens=30)
    assert meter.measured(generate_seconds=4.0) == {
        "prompt_tokens": 100,
        "completion_tokens": 40,
        "output_tokens_per_second": 10.0,
        "total_tokens_per_second": 35.0,
        "num_stages": 2,
        "num_replicas": 1,
        "stage_utilization": (0.75, 0.25),
        "host_to_device_bytes": 0,
        "device_to_host_bytes": 0,
        "stall_seconds": 0.0,
        "predictor_mean_absolute_error_tokens": None,
        "predictor_sum_error": None,
    }


def test_what_the_links_did_is_summed_over_stages_steps_and_replicas() -> None:
    meter = Meter(num_stages=2, num_replicas=2)
    for replica in range(2):
        for _ in range(3):
            uses = (LinkUse(0.25, 100, 10, 0.5, 0.125), LinkUse(0.5, 200, 20, 0.5, 0.125))
            meter.add_step(StepResult(0, NO_TOKENS, {}, (1.0, 0.5), uses), 0, 0, replica)
    measured = meter.measured(generate_seconds=6.0)
    assert (measured["host_to_device_bytes"], measured["device_to_host_bytes"]) == (1800, 180)
    assert measured["stall_seconds"] == 4.5
    assert measured["stage_utilization"] == (0.375, 0.0, 0.375, 0.0)  # a stage that waits does not compute


def test_every_replica_has_its_own_utilization() -> None:
    meter = Meter(num_stages=1, num_replicas=2)
    meter.add_step(step_result(1.0), 0, 0, replica=0)
    meter.add_step(step_result(2.0), 0, 0, replica=1)
    measured = meter.measured(generate_seconds=4.0)
    assert measured["num_replicas"] == 2
    assert measured["stage_utilization"] == (0.25, 0.5)


def test_a_run_without_steps_has_no_rates() -> None:
    assert Meter(num_stages=1).measured(0.0)["stage_utilization"] == (0.0,)


def test_the_meter_compares_forecasts_with_what_came() -> None:
    meter = Meter(num_stages=1)
    key = outcomes_of([1])[0].key
    for predicted, status in ((5, RowStatus.SUCCEEDED), (2, RowStatus.SUCCEEDED), (9, RowStatus.FAILED)):
        meter.add_outcomes([Outcome(key, 4, predicted, (sample(status),))])  # a sample that succeeded has 3 tokens
    meter.add_outcomes(outcomes_of([3]))
    measured = meter.measured(1.0)
    assert measured["predictor_mean_absolute_error_tokens"] == 1.5
    assert measured["predictor_sum_error"] == pytest.approx(1 / 6)
