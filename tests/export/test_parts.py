"""Completions in the order of the input, whatever the order in which they were committed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchpipe.errors import OutputError
from batchpipe.export import parts as parts_module
from batchpipe.export.parts import open_completions, take_rows
from batchpipe.types import Carried, Outcome, RowKey
from batchpipe.write.place import Place, open_place
from batchpipe.write.schema import completions_schema
from batchpipe.write.writer import CompletionWriter
from tests.write.completion_cases import open_folder, outcomes_of, sample


def write(path: Path, order: list[int], part_rows: int = 10, num_samples: int = 1) -> None:
    with open_folder(path) as folder, CompletionWriter(folder, part_rows) as writer:
        for start in range(0, len(order), 3):
            writer.write(outcomes_of(order[start : start + 3], num_samples))


def nearly_sorted(num_rows: int) -> list[int]:
    """As rows end in a run: a window is under way, and a few rows take far longer than all others."""
    chance = random.Random(1)
    return sorted(range(num_rows), key=lambda row: row + chance.random() * 40 + (300 if row % 97 == 0 else 0))


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    read = parts_module._read

    def counted(place: Place, name: str) -> pa.Table:
        reads.append(name)
        return read(place, name)

    monkeypatch.setattr(parts_module, "_read", counted)
    return reads


@pytest.mark.parametrize("window_rows", [1, 17, 64, 10_000])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_every_row_comes_once_and_in_order(tmp_path: Path, window_rows: int, num_samples: int) -> None:
    write(tmp_path, nearly_sorted(400), num_samples=num_samples)
    rows = list(open_completions(open_place(tmp_path)).rows(window_rows=window_rows))
    keys = [(row["row_index"], row["sample_index"]) for row in rows]
    assert keys == [(row, index) for row in range(400) for index in range(num_samples)]
    assert rows[5 * num_samples]["row_id"] == "row 5" and rows[5 * num_samples]["topic"] == "topic 5"


def test_a_part_is_read_as_often_as_windows_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, nearly_sorted(4_000), part_rows=100)
    reads = counted_reads(monkeypatch)
    completions = open_completions(open_place(tmp_path))
    assert sum(1 for _ in completions.rows(window_rows=500)) == 4_000
    assert len(reads) <= 3 * len(completions.parts) == 120


def test_windows_grow_with_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, list(range(300)), part_rows=100)
    reads = counted_reads(monkeypatch)
    assert len(list(open_completions(open_place(tmp_path)).rows(window_rows=1))) == 300
    assert len(reads) == 3


def test_what_is_committed_during_a_run_can_be_read(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder, CompletionWriter(folder, part_rows=10) as writer:
        with pytest.raises(OutputError, match="holds no completions yet"):
            open_completions(open_place(tmp_path))
        writer.write(outcomes_of(range(25)))
        writer._wait()
        assert [row["row_index"] for row in open_completions(open_place(tmp_path)).rows()] == list(range(20))


def test_a_part_that_was_not_recorded_is_found(tmp_path: Path) -> None:
    write(tmp_path, list(range(25)), num_samples=2)
    log = tmp_path / "_batchpipe" / "commits.jsonl"
    log.write_bytes(log.read_bytes().split(b"\n")[0] + b"\n")
    assert [row["row_index"] for row in open_completions(open_place(tmp_path)).rows()] == [
        row for row in range(25) for _ in "ab"
    ]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is no output folder of batchpipe"):
        open_completions(open_place(tmp_path))
    write(tmp_path, list(range(25)))
    first, second, _ = sorted((tmp_path / "completions").iterdir())
    second.write_bytes(b"PAR1 and no more")
    with pytest.raises(OutputError, match=r"part-00001\.parquet: cannot be read as a part"):
        list(open_completions(open_place(tmp_path)).rows())
    first.unlink()
    with pytest.raises(OutputError, match=r"part-00000\.parquet: was committed and cannot be found"):
        open_completions(open_place(tmp_path))


def test_only_the_columns_asked_for_are_given_and_need_to_be_writable(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"when": pa.array([0, 10**12], pa.timestamp("s"))})
    schema = completions_schema(batch.schema, with_logprobs=False)
    with open_folder(tmp_path, schema=schema) as folder, CompletionWriter(folder, part_rows=2) as writer:
        writer.write([Outcome(RowKey(i, str(i), Carried(batch, i)), 1, None, (sample(),)) for i in (0, 1)])
    completions = open_completions(open_place(tmp_path))
    rows = list(completions.rows({"row_id", "sample_index", "absent"}))
    assert rows == [{"row_id": "0", "sample_index": 0}, {"row_id": "1", "sample_index": 0}]
    with pytest.raises(OutputError, match="a carried column cannot be written as text"):
        list(completions.rows())


def test_views_can_be_taken(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"view": pa.array(["x", "y"], pa.string_view())})
    schema = completions_schema(batch.schema, with_logprobs=False)
    with open_folder(tmp_path, schema=schema) as folder, CompletionWriter(folder, part_rows=1) as writer:
        writer.write([Outcome(RowKey(i, str(i), Carried(batch, i)), 1, None, (sample(),)) for i in (1, 0)])
    completions = open_completions(open_place(tmp_path))
    assert [row["view"] for row in completions.rows()] == ["x", "y"]
    table = pa.Table.from_batches([batch])
    assert take_rows(table, np.array([1]))["view"].to_pylist() == ["y"]
