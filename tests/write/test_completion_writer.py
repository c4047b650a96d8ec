"""Every row once, whatever is killed and whenever."""

import json
import os
import time
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchpipe
from batchpipe.errors import InterruptedRunError
from batchpipe.write import commit, crash, folder, writer
from batchpipe.write.row_log import RowLog
from batchpipe.write.row_set import RowCounts
from batchpipe.write.writer import CompletionWriter
from tests.write.completion_cases import (
    IDENTITY,
    SCHEMA,
    Died,
    fail_at,
    open_folder,
    outcomes_of,
    read_completions,
    row_indexes,
    run_in_a_process,
    run_job,
)

CRASH_POINTS = [
    "after_log_append",
    "after_tmp_write",
    "before_rename",
    "after_rename",
    "before_commit_record",
    "after_commit_record",
    "before_manifest",
    "before_success",
]


def test_a_finished_output_holds_all_rows_and_says_so(tmp_path: Path) -> None:
    run_job(tmp_path, 25)
    assert row_indexes(tmp_path) == list(range(25))
    assert (tmp_path / "_SUCCESS").read_bytes() == b""
    manifest = json.loads((tmp_path / "_batchpipe" / "manifest.json").read_bytes())
    assert {key: manifest["rows"][key] for key in ("succeeded", "failed", "canceled")} == {
        "succeeded": 21,
        "failed": 4,
        "canceled": 0,
    }
    assert [(part["name"], part["rows"]) for part in manifest["parts"]] == [
        ("part-00000.parquet", 10),
        ("part-00001.parquet", 10),
        ("part-00002.parquet", 5),
    ]
    assert sorted(path.name for path in (tmp_path / "_batchpipe").iterdir()) == [
        "commits.jsonl",
        "identity.json",
        "job.yaml",
        "lock",
        "manifest.json",
        "started",
    ]
    with open_folder(tmp_path) as again:
        assert again.finished and len(again.done) == 25


def test_a_part_says_in_its_footer_whose_it_is(tmp_path: Path) -> None:
    run_job(tmp_path, 3)
    file = pq.ParquetFile(tmp_path / "completions" / "part-00000.parquet")
    with file:
        assert file.schema_arrow.equals(SCHEMA)
        metadata = {key: value for key, value in file.metadata.metadata.items() if key.startswith(b"batchpipe.")}
        assert metadata == {
            b"batchpipe.version": batchpipe.__version__.encode(),
            b"batchpipe.model": b"tiny",
            b"batchpipe.revision": b"abc",
            b"batchpipe.identity_sha256": IDENTITY.sha256.encode(),
            b"batchpipe.schema_version": b"1",
        }
        column = file.metadata.row_group(0).column(0)
        assert column.compression == "ZSTD" and column.has_offset_index


def test_other_readers_read_the_parts(tmp_path: Path) -> None:
    import datasets
    import pandas

    run_job(tmp_path, 25)
    completions = tmp_path / "completions"
    frame = pandas.read_parquet(completions)
    assert sorted(frame["row_index"]) == list(range(25)) and (frame["status"] == "failed").sum() == 4
    assert pyarrow.dataset.dataset(tmp_path / "completions").to_table().num_rows == 25
    loaded = datasets.load_dataset(
        "parquet", data_files=str(completions / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(loaded["row_id"]) == sorted(f"row {i}" for i in range(25))


def test_an_empty_input_makes_an_empty_table_with_all_columns(tmp_path: Path) -> None:
    run_job(tmp_path, 0)
    run_job(tmp_path, 0)
    assert read_completions(tmp_path).schema.equals(SCHEMA) and row_indexes(tmp_path) == []


def test_samples_of_a_row_are_never_split_between_parts(tmp_path: Path) -> None:
    with open_folder(tmp_path) as output, CompletionWriter(output, part_rows=4) as completions:
        completions.write(outcomes_of(range(5), num_samples=3))
        completions.finish(5)
        assert completions.counts == RowCounts(4, 1, 0, {"empty_prompt": 1}, prompt_tokens=25, completion_tokens=36)
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "completions").iterdir())]
    assert sizes == [6, 6, 3]


def test_a_row_that_has_an_outcome_is_our_mistake(tmp_path: Path) -> None:
    with open_folder(tmp_path) as output, CompletionWriter(output, part_rows=100) as completions:
        completions.write(outcomes_of([1, 2]))
        with pytest.raises(AssertionError, match="given an outcome twice"):
            completions.write(outcomes_of([2, 3]))
    assert row_indexes(tmp_path) == [1, 2]


def test_an_output_that_lacks_rows_is_not_declared_complete(tmp_path: Path) -> None:
    with open_folder(tmp_path) as output, CompletionWriter(output, part_rows=100) as completions:
        completions.write(outcomes_of(range(4)))
        with pytest.raises(AssertionError, match="4 rows committed of 5"):
            completions.finish(5)
    assert not (tmp_path / "_SUCCESS").exists()


def test_an_interrupted_run_commits_what_it_has(tmp_path: Path) -> None:
    with (
        pytest.raises(InterruptedRunError),
        open_folder(tmp_path) as output,
        CompletionWriter(output, part_rows=100) as completions,
    ):
        completions.write(outcomes_of([5, 0, 3]))
        raise InterruptedRunError("SIGTERM")
    assert row_indexes(tmp_path) == [0, 3, 5]
    run_job(tmp_path, 8)
    assert row_indexes(tmp_path) == list(range(8))


def test_the_log_is_synced_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_seconds = [100.0]
    synced = []
    monkeypatch.setattr(time, "monotonic", lambda: now_seconds[0])
    monkeypatch.setattr(RowLog, "sync", lambda log: synced.append(log.path.name))
    with open_folder(tmp_path) as output, CompletionWriter(output, part_rows=100) as completions:
        completions.write(outcomes_of([0]))
        now_seconds[0] += 0.9
        completions.write([])
        assert synced == []
        now_seconds[0] += 0.2
        completions.write([])
        completions.write([])
    assert synced == ["rows-00000.log"]


@pytest.mark.parametrize("point", [*CRASH_POINTS, "after_log_append:6", "after_rename:2", "after_commit_record:3"])
def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path, point: str) -> None:
    died = run_in_a_process(tmp_path, 25, BATCHPIPE_CRASH_AT=point)
    assert died.returncode == 137, died.stderr
    assert not (tmp_path / "_SUCCESS").exists()
    with open_folder(tmp_path) as output:
        assert len(output.done) >= 3  # the first write returned, or was logged
    run_job(tmp_path, 25)
    assert row_indexes(tmp_path) == list(range(25))
    assert (tmp_path / "_SUCCESS").exists()


DEATH = st.tuples(st.sampled_from(CRASH_POINTS), st.integers(1, 4))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    total_rows=st.integers(0, 40),
    runs=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 7), DEATH), max_size=4),
)
def test_any_runs_and_deaths_end_with_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, total_rows: int, runs: list[tuple[int, int, tuple[str, int]]]
) -> None:
    path = tmp_path_factory.mktemp("run")
    for part_rows, write_rows, (point, occurrence) in runs:
        with pytest.MonkeyPatch.context() as patch:
            for module in (commit, folder, writer):
                patch.setattr(module, "crash_point", fail_at(point, occurrence))
            try:
                run_job(path, total_rows, part_rows, write_rows)
            except Died:
                continue
    run_job(path, total_rows)
    assert row_indexes(path) == list(range(total_rows))
    with open_folder(path) as output:
        assert output.finished and output.counts.total == len(output.done) == total_rows


def test_a_crash_point_strikes_the_time_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv(crash.CRASH_VARIABLE, "here:2")
    monkeypatch.setattr(crash, "_times_passed", type(crash._times_passed)())
    for name in ("here", "there", "here", "here"):
        crash.crash_point(name)
    assert ended == [137]
