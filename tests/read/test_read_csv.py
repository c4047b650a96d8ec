"""CSV and TSV: cells are the text that stands there, and what is wrong costs its own row alone."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import ErrorCode, FailedRow, Row


def source_of(path: Path, content: str | bytes | None = None, **keys: Any) -> Source:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    spec = InputSpec.model_validate({"path": str(path), **keys})
    return open_source(spec, carry="all", needed=frozenset(["prompt"]))


def read(source: Source) -> list[tuple[str, str | ErrorCode]]:
    """(id, prompt or error code) of every row."""
    rows = list(source.rows())
    return [(r.key.row_id, r.values["prompt"] if isinstance(r, Row) else r.code) for r in rows]


def messages_of(source: Source) -> list[str]:
    return [row.message for row in source.rows() if isinstance(row, FailedRow)]


@pytest.mark.parametrize(
    "content",
    [
        "id,prompt\na,x\nb,y\n",
        "id,prompt\r\na,x\r\nb,y",
        "\ufeffid,prompt\na,x\n\nb,y\n\n",
        'id, prompt\n"a","x"\nb,y\n',
        "id;prompt\na;x\nb;y\n",
    ],
)
def test_the_forms_of_one_table(tmp_path: Path, content: str) -> None:
    assert read(source_of(tmp_path / "x.csv", content)) == [("a", "x"), ("b", "y")]
    packed = gzip.compress(content.encode())
    assert read(source_of(tmp_path / "x.csv.gz", packed)) == [("a", "x"), ("b", "y")]


def test_cells_in_quotes_hold_line_ends_delimiters_and_quotes(tmp_path: Path) -> None:
    content = 'id,prompt\na,"one\r\ntwo, ""three""\n\nfour"\nb,5" disk\nc,""\n'
    rows = [("a", 'one\r\ntwo, "three"\n\nfour'), ("b", '5" disk'), ("c", "")]
    assert read(source_of(tmp_path / "x.csv", content)) == rows
    assert read(source_of(tmp_path / "x.tsv", 'prompt\tid\n"p\tq"\ta\nr, s\tb\n')) == [("a", "p\tq"), ("b", "r, s")]


def test_no_cell_is_retyped(tmp_path: Path) -> None:
    source = source_of(
        tmp_path / "x.csv", "id,prompt,n,zip,,when\n007,x,1,01234,i,2026-01-02\n8,NA,odd,,j,\n9,1e3,3,1,k,\n"
    )
    names = ["id", "prompt", "n", "zip", "Unnamed: 4", "when"]
    assert source.carried_schema == pa.schema([(name, pa.string()) for name in names])
    assert read(source) == [("007", "x"), ("8", "NA"), ("9", "1e3")]
    first = next(source.rows()).key.carried.batch
    assert first.column("zip").to_pylist() == ["01234", "", "1"]
    assert first.column("n").to_pylist() == ["1", "odd", "3"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"b,y,z", ErrorCode.INVALID_CSV, "x.csv, line 3: 3 cells where the first row names 2 columns"),
        (b"b", ErrorCode.INVALID_CSV, "1 cells"),
        (b'b,"y"z', ErrorCode.INVALID_CSV, "line 3: no row of CSV"),
        (b'b,"y', ErrorCode.LINE_TOO_LONG, "line 3: longer than input.max_line_bytes, or its quote never ends"),
        (b"b,y\rz", ErrorCode.INVALID_CSV, "no row of CSV"),
        (b"b,\xff", ErrorCode.INVALID_UTF8, "x.csv, line 3: not valid UTF-8"),
        (b"b," + b"y" * 200, ErrorCode.LINE_TOO_LONG, "line 3: longer than input.max_line_bytes"),
    ],
)
def test_a_bad_row_is_one_failed_row(tmp_path: Path, line: bytes, code: ErrorCode, words: str) -> None:
    content = b"id,prompt\na,x\n" + line + b"\nc,z\n" + b"d,w\n" * 40
    source = source_of(tmp_path / "x.csv", content, max_line_bytes=100)
    rows = read(source)
    assert rows[:3] == [("a", "x"), ("x.csv:2", code), ("c", "z")]
    assert len(rows) == 43
    [message] = [m for m in messages_of(source) if "earlier row" not in m]
    assert words in message


def test_the_last_row_may_be_cut_off(tmp_path: Path) -> None:
    assert read(source_of(tmp_path / "x.csv", 'id,prompt\na,x\nb,"y\nc,z\n')) == [
        ("a", "x"),
        ("x.csv:2", ErrorCode.INVALID_CSV),
        ("c", "z"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("question,answer\nx,y\n", "has no column 'prompt'"),
        ("prompt,prompt\nx,y\n", "more than one column 'prompt'"),
        ('"prompt\nx\n', "the header of the columns cannot be read: x.csv, line 1"),
        ("prompt\nx\n".encode("utf-16"), "is UTF-16; text is read as UTF-8"),
    ],
)
def test_what_is_refused_at_once(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        source_of(tmp_path / "x.csv", content)


def test_every_file_has_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,id\nx,a\n")
    (tmp_path / "b.csv").write_text("id,prompt\nb,y\n")
    assert read(source_of(tmp_path)) == [("a", "x"), ("b", "y")]
    (tmp_path / "b.csv").write_text("b,y\nc,z\n")
    with pytest.raises(InputError, match=r"column 'b' is in .*b\.csv, but not in .*a\.csv"):
        source_of(tmp_path)


def test_rows_go_on_where_they_stopped(tmp_path: Path) -> None:
    lines = "".join(f'r{n},"p\n{n}"\n' for n in range(2_500))
    source = source_of(tmp_path / "x.csv", "id,prompt\n" + lines)
    assert source.num_rows() is None
    rows = list(source.rows(skip=range(2_000)))
    assert [row.key.row_id for row in rows] == [f"r{n}" for n in range(2_000, 2_500)]
    last = rows[-1].key.carried
    assert last.batch.column("prompt")[last.offset].as_py() == "p\n2499"
    assert source.progress == 1.0
    assert source_of(tmp_path / "x.csv").fingerprint == source.fingerprint


def test_a_file_without_rows(tmp_path: Path) -> None:
    assert read(source_of(tmp_path / "x.csv", "")) == []
    assert read(source_of(tmp_path / "y.csv", "id,prompt\n")) == []
