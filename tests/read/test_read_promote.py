"""Files that store a column in several ways are one input."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import Row

TEXT = pa.string()


def message_list(*fields: pa.Field) -> pa.DataType:
    return pa.list_(pa.struct(list(fields)))


def source_of(folder: Path, columns: list[pa.Array]) -> Source:
    folder.mkdir()
    for number, column in enumerate(columns):
        table = pa.table({"prompt": ["x"] * len(column), "c": column})
        pq.write_table(table, folder / f"{number}.parquet")
    return open_source(InputSpec(path=(str(folder),)), carry="all", needed=frozenset(["prompt"]))


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), pa.large_string()),
        (pa.array(["a"]), pa.array(["b"], pa.string_view()), pa.large_string()),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"]), TEXT),
        (pa.array([["a"]]), pa.array([["b"]], pa.large_list(TEXT)), pa.large_list(TEXT)),
        (pa.array([b"a"]), pa.array([b"b"], pa.large_binary()), pa.large_binary()),
        (pa.array([None]), pa.array(["b"]), TEXT),
        (pa.array(["a"]), pa.nulls(2), TEXT),
        (pa.array([[]], pa.list_(pa.null())), pa.array([["b"]]), pa.list_(TEXT)),
        (pa.array([1], pa.int32()), pa.array([2], pa.int64()), pa.int64()),
        (pa.array([1]), pa.array([2.0, None]), pa.float64()),
        (
            pa.array([[{"role": "user"}]], message_list(pa.field("role", TEXT, nullable=False))),
            pa.array([[{"role": "tool"}]], message_list(pa.field("role", TEXT))),
            message_list(pa.field("role", TEXT)),
        ),
        (
            pa.array([[{"role": "user"}]]),
            pa.array([[{"role": "tool", "name": "add"}]]),
            message_list(pa.field("role", TEXT), pa.field("name", TEXT)),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_forms_of_a_type_are_one(
    tmp_path: Path,
    first: pa.Array,
    second: pa.Array,
    joined: pa.DataType,
    turned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    columns = [second, first] if turned else [first, second]
    source = source_of(tmp_path / "in", columns)
    assert source.carried_schema.field("c").type == joined
    rows = list(source.rows())
    assert all(isinstance(row, Row) for row in rows)
    cells = [row.key.carried.batch["c"][row.key.carried.offset].as_py() for row in rows]
    expected = pa.chunked_array([column.cast(joined) for column in columns]).to_pylist()
    assert cells == expected
    [warning] = caplog.messages
    assert "'c' (" in warning


def test_a_whole_number_that_no_double_holds_is_rounded(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in", [pa.array([2**53 + 1]), pa.array([0.5])])
    assert [row.key.carried.batch["c"][0].as_py() for row in source.rows()] == [float(2**53), 0.5]


def test_types_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 'c' is int64 in .*1\.parquet, but string in .*0\.parquet"):
        source_of(tmp_path / "in", [pa.array(["a"]), pa.array([1])])
