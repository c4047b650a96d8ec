"""Failed rows run again, the others stay, and a kill at any moment loses and doubles none."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchpipe.types import Outcome, RowStatus
from batchpipe.write import retry
from batchpipe.write.retry import JOURNAL, drop_failed
from batchpipe.write.row_set import RowCounts
from batchpipe.write.writer import CompletionWriter
from tests.write.completion_cases import (
    Died,
    fail_at,
    open_folder,
    outcomes_of,
    read_completions,
    row_indexes,
    run_job,
    sample,
)


def retried(path: Path, total_rows: int) -> None:
    """Runs the rows without an outcome, all of which succeed now."""
    with open_folder(path) as folder:
        drop_failed(folder)
        with CompletionWriter(folder, 10) as writer:
            for outcome in outcomes_of(index for index in range(total_rows) if index not in folder.done):
                writer.write([Outcome(outcome.key, 5, None, (sample(RowStatus.SUCCEEDED),))])
            writer.finish(total_rows)


def test_failed_rows_are_computed_again_and_the_others_are_kept(tmp_path: Path) -> None:
    run_job(tmp_path, 25)
    before = read_completions(tmp_path)
    with open_folder(tmp_path) as folder:
        assert folder.finished and drop_failed(folder) == 4
        assert not folder.finished and folder.counts == RowCounts(21, 0, 0, {}, 105, 63)
        assert [index for index in range(25) if index not in folder.done] == [0, 7, 14, 21]
    retried(tmp_path, 25)
    after = read_completions(tmp_path)
    assert after.column("status").to_pylist() == ["succeeded"] * 25
    kept = [index for index in range(25) if index % 7]
    assert after.take(kept) == before.take(kept)
    with open_folder(tmp_path) as folder:
        assert folder.finished and folder.counts.total == 25 and drop_failed(folder) == 0 and folder.finished


def test_all_samples_of_a_row_run_again_if_one_failed(tmp_path: Path) -> None:
    both = (sample(RowStatus.SUCCEEDED), sample(RowStatus.FAILED))
    with open_folder(tmp_path) as folder, CompletionWriter(folder, 10) as writer:
        writer.write(
            [
                Outcome(outcome.key, 5, None, both[:1] * 2 if i else both)
                for i, outcome in enumerate(outcomes_of(range(3)))
            ]
        )
        writer.finish(3)
    with open_folder(tmp_path) as folder:
        assert drop_failed(folder) == 1
    assert row_indexes(tmp_path) == [1, 1, 2, 2]


def test_a_part_of_failed_rows_alone_stays_as_an_empty_one(tmp_path: Path) -> None:
    run_job(tmp_path, 1)
    with open_folder(tmp_path) as folder:
        assert drop_failed(folder) == 1
    assert row_indexes(tmp_path) == []
    retried(tmp_path, 1)
    assert row_indexes(tmp_path) == [0]


@pytest.mark.parametrize("point", ["after_journal", "after_part_rewrite", "before_journal_end"])
@pytest.mark.parametrize("occurrence", [1, 2])
def test_a_kill_on_the_way_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, occurrence: int
) -> None:
    run_job(tmp_path, 25)
    with monkeypatch.context() as patched:
        patched.setattr(retry, "crash_point", fail_at(point, occurrence))
        reached = point == "after_part_rewrite" or occurrence == 1
        with open_folder(tmp_path) as folder:
            if reached:
                with pytest.raises(Died):
                    drop_failed(folder)
            else:
                assert drop_failed(folder) == 4
    assert (tmp_path / JOURNAL).exists() == reached
    with open_folder(tmp_path) as folder:  # a run without the flag
        assert not folder.finished and folder.counts == RowCounts(21, 0, 0, {}, 105, 63)
    assert not (tmp_path / JOURNAL).exists()
    retried(tmp_path, 25)
    assert row_indexes(tmp_path) == list(range(25))
