"""A disk that fills up, refuses, tears a file or gives back something else costs no committed row."""

import errno
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchpipe.errors import OutputError
from batchpipe.write import commit, writer
from batchpipe.write.writer import CompletionWriter
from tests.write.completion_cases import (
    Died,
    fail_at,
    open_folder,
    outcomes_of,
    row_indexes,
    run_in_a_process,
    run_job,
)


def test_a_torn_row_log_costs_only_the_torn_rows(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "crash_point", fail_at("after_log_append", 3))
        with pytest.raises(Died):
            run_job(tmp_path, 9, part_rows=100)
    log = tmp_path / "_batchpipe" / "rows-00000.log"
    log.write_bytes(log.read_bytes()[:-1])
    with open_folder(tmp_path) as output:
        assert [index in output.done for index in range(9)] == [True] * 6 + [False] * 3
    assert row_indexes(tmp_path) == list(range(6))


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_a_disk_that_refuses_is_named_and_the_next_run_goes_on(tmp_path: Path, place: str) -> None:
    with pytest.raises(Died), pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "crash_point", fail_at("after_rename", 1))
        run_job(tmp_path, 12, part_rows=5)
    (committed,) = (tmp_path / "completions").iterdir()
    data = committed.read_bytes()

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, place, refuse)
        with pytest.raises(OutputError, match="No space left on device.*the same command continues"):
            run_job(tmp_path, 12)
    assert committed.read_bytes() == data
    run_job(tmp_path, 12)
    assert row_indexes(tmp_path) == list(range(12))


@pytest.mark.parametrize("limit_bytes", [3000, 6000, 9000])
def test_a_real_limit_on_file_size(tmp_path: Path, limit_bytes: int) -> None:
    run_job(tmp_path / "run", 4)
    before = row_indexes(tmp_path / "run")
    (tmp_path / "run" / "_SUCCESS").unlink()
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))"
    ended = run_in_a_process(tmp_path / "run", 400, prelude)
    assert ended.returncode == 1
    assert "batchpipe.errors.OutputError" in ended.stderr and "File too large" in ended.stderr
    assert set(row_indexes(tmp_path / "run")) >= set(before)
    run_job(tmp_path / "run", 400)
    assert row_indexes(tmp_path / "run") == list(range(400))


def test_a_failure_in_the_background_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        pytest.raises(OutputError, match=r"part-00000\.parquet: cannot be written: Input/output error"),
        open_folder(tmp_path) as output,
        CompletionWriter(output, part_rows=2) as completions,
    ):
        monkeypatch.setattr(pq, "write_table", refuse)
        completions.write(outcomes_of([0, 1]))
        completions.write(outcomes_of([2, 3]))
    monkeypatch.undo()
    run_job(tmp_path, 6)
    assert row_indexes(tmp_path) == list(range(6))


def test_a_disk_that_gives_back_other_rows_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write_table = pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda table, *args, **more: real_write_table(table.slice(1), *args, **more))
    with (
        pytest.raises(OutputError, match="holds other rows than were written"),
        open_folder(tmp_path) as output,
        CompletionWriter(output, part_rows=2) as completions,
    ):
        completions.write(outcomes_of([0, 1]))
        completions.finish(2)
    assert not list((tmp_path / "completions").iterdir())
