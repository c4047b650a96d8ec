"""Arrow IPC in its two forms, and which files of a folder are rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import feather, ipc

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import Row

TABLE = pa.table(
    {
        "id": [f"r{n}" for n in range(2_500)],
        "prompt": pa.array([f"p{n}" for n in range(2_500)], pa.large_string()),
        "tags": pa.array([[n, None] for n in range(2_500)], pa.list_(pa.int16())),
    }
)


def source_of(path: Path | str, **keys: Any) -> Source:
    spec = InputSpec.model_validate({"path": str(path), **keys})
    return open_source(spec, carry="all", needed=frozenset(["prompt"]))


def write(path: Path, form: str, table: pa.Table = TABLE) -> Path:
    with (ipc.new_file if form == "file" else ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1_700)
    return path


@pytest.mark.parametrize("form", ["file", "stream", "feather", "stream.gz"])
def test_rows_and_exact_types(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.arrow"
    if form == "feather":
        path = tmp_path / "x.feather"
        feather.write_feather(TABLE, path)
    elif form == "stream.gz":
        path = tmp_path / "x.arrow.gz"
        path.write_bytes(gzip.compress(write(tmp_path / "x", "stream").read_bytes()))
    else:
        write(path, form)
    source = source_of(path)
    assert source.num_rows() == (None if path.suffix == ".gz" else 2_500)
    assert source.carried_schema == TABLE.schema
    rows = list(source.rows(skip=range(2_000)))
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == TABLE["prompt"].to_pylist()[2_000:]
    assert rows[0].key.index == 2_000
    carried = rows[0].key.carried
    assert carried.batch.column("tags")[carried.offset].as_py() == [2_000, None]
    assert source.progress == 1.0
    assert source_of(path).fingerprint == source.fingerprint


def test_files_of_both_forms_are_one_input(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", "file")
    write(tmp_path / "b.arrow", "stream", TABLE.slice(0, 3))
    source = source_of(tmp_path, id_column=None)
    assert (source.num_rows(), [row.key.row_id for row in source.rows()][-1]) == (2_503, "b.arrow:3")
    write(tmp_path / "b.arrow", "stream", TABLE.drop_columns(["tags"]))
    with pytest.raises(InputError, match=r"column 'tags' is in .*a\.arrow, but not in .*b\.arrow"):
        source_of(tmp_path)


@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_damaged_file_is_refused(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "x.arrow", form)
    whole = path.read_bytes()
    path.write_bytes(b"no arrow at all")
    with pytest.raises(InputError, match="cannot be read as Arrow"):
        source_of(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as Arrow"):
        list(source_of(path).rows())
    (tmp_path / "y.arrow.gz").write_bytes(gzip.compress(write(tmp_path / "y", "file").read_bytes()))
    with pytest.raises(InputError, match="only the stream form of Arrow can be read compressed"):
        source_of(tmp_path / "y.arrow.gz")


def test_a_saved_dataset_is_read_wherever_it_lies(tmp_path: Path) -> None:
    """An object store is no disk, so its files are read by their names, without those that `datasets` puts beside."""
    datasets.Dataset.from_dict({"prompt": ["x", "y", "z"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    rows = [row.key.row_id for row in source_of(f"file://{tmp_path}/saved").rows()]
    assert rows == ["data-00000-of-00002.arrow:1", "data-00000-of-00002.arrow:2", "data-00001-of-00002.arrow:1"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["a.jsonl", "config.json", "requirements.txt", "labels.csv"], ["a.jsonl"]),
        (["a.csv", "LICENSE.txt"], ["a.csv"]),
        (["a.txt", "README.md"], ["a.txt"]),
        (["a.json", "dataset_infos.json"], ["a.json"]),
    ],
)
def test_what_stands_beside_rows_is_left_out(
    tmp_path: Path, names: list[str], read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).write_text("prompt\nx\n" if name.endswith(".csv") else '{"prompt": "x"}\n')
    assert [row.key.row_id for row in source_of(tmp_path).rows()] == [f"{name}:1" for name in read]
    assert "left out, as no rows by their names" in caplog.text


def test_files_that_are_named_are_all_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "state.json").write_text('[{"prompt": "y"}]')
    assert [row.key.row_id for row in source_of(tmp_path / "state.json").rows()] == ["state.json:1"]
    spec = InputSpec.model_validate({"path": [f"{tmp_path}/a.jsonl", f"{tmp_path}/state.json"]})
    with pytest.raises(InputError, match="files of several formats"):
        open_source(spec, carry="all", needed=frozenset(["prompt"]))


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffWhy?\r\n\n  How? \nlast".encode() + b"\n\xff\n")
    rows = list(source_of(path).rows())
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == ["Why?", "  How? ", "last"]
    assert [row.key.row_id for row in rows] == [f"x.txt:{n}" for n in (1, 2, 3, 4)]
    assert str(getattr(rows[-1], "message", "")).startswith("x.txt, line 5: not valid UTF-8")
    spec = InputSpec.model_validate({"path": str(path), "prompt_column": "question"})
    source = open_source(spec, carry="all", needed=frozenset(["question"]))
    assert source.carried_schema.names == ["question"]
