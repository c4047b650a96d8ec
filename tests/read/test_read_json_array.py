"""JSON arrays of objects: the same rows whatever stands between them and wherever the reads end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.formats import json_array, line_file
from batchpipe.read.source import Source, open_source
from batchpipe.types import ErrorCode, FailedRow, Row

ROWS = [{"id": "a", "prompt": 'x "y" \\ [{', "n": 1}, {"id": "b", "prompt": "]},\n,", "n": 2, "more": [[{"k": "]"}]]}]


def source_of(path: Path, content: str | bytes | None = None, **keys: Any) -> Source:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    spec = InputSpec.model_validate({"path": str(path), **keys})
    return open_source(spec, carry="all", needed=frozenset(["prompt"]))


def read(source: Source) -> list[tuple[str, str | ErrorCode]]:
    """(id, prompt or error code) of every row."""
    rows = list(source.rows())
    return [(r.key.row_id, r.values["prompt"] if isinstance(r, Row) else r.code) for r in rows]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        "\ufeff\n" + json.dumps(ROWS, indent=2) + "\n",
        "".join(json.dumps(row) + "\n" for row in ROWS),
        json.dumps(ROWS)[:-1] + ",]",
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 3, 262_144])
def test_arrays_and_lines(tmp_path: Path, content: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(line_file, "BLOCK_BYTES", max(block_bytes, 200))
    source = source_of(tmp_path / "x.json", content)
    assert read(source) == [("a", ROWS[0]["prompt"]), ("b", ROWS[1]["prompt"])]
    assert source.carried_schema.field("n").type == pa.int64()
    assert source.progress == 1.0
    assert read(source_of(tmp_path / "x.json.gz", gzip.compress(content.encode()))) == read(source)


@pytest.mark.parametrize(
    ("item", "code", "words"),
    [
        ('{"prompt": NaN}', ErrorCode.INVALID_JSON, "x.json, item 2: not valid JSON"),
        ('{"prompt" "y"}', ErrorCode.INVALID_JSON, "item 2: not valid JSON"),
        ('"y"', ErrorCode.NOT_AN_OBJECT, "item 2: a string where an object belongs"),
        ('{"prompt": "y", "prompt": "z"}', ErrorCode.INVALID_JSON, "the key 'prompt' is given twice"),
        ('{"prompt": "' + "y" * 900 + '\\\\\\""}', ErrorCode.LINE_TOO_LONG, "item 2: longer"),
        ('{"prompt": [' + "[1]," * 200 + "[]]}", ErrorCode.LINE_TOO_LONG, "item 2: longer"),
    ],
)
@pytest.mark.parametrize("block_bytes", [7, 262_144])
def test_a_bad_item_is_one_failed_row(
    tmp_path: Path, item: str, code: ErrorCode, words: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block_bytes)
    content = f'[{{"id": "a", "prompt": "x"}},\n{item},\n{{"id": "c", "prompt": "z"}}]'
    source = source_of(tmp_path / "x.json", content, max_line_bytes=300)
    assert read(source) == [("a", "x"), ("x.json:2", code), ("c", "z")]
    [message] = [row.message for row in source.rows() if isinstance(row, FailedRow)]
    assert words in message


@pytest.mark.parametrize("end", ["", ",", ', {"id": "c"', '] [{"id"', "] x", "]]"])
def test_an_array_that_does_not_end_is_refused_behind_its_rows(tmp_path: Path, end: str) -> None:
    with pytest.raises(InputError, match="x.json is damaged or cut off"):
        read(source_of(tmp_path / "x.json", json.dumps(ROWS)[:-1] + end))


@pytest.mark.parametrize("content", ['{\n "data": [\n  {"prompt": "x"}\n ]\n}\n', "prompt\nx\n"])
def test_what_holds_no_rows_is_told_at_once(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="is neither an array of objects"):
        source_of(tmp_path / "x.json", content)
    with pytest.raises(InputError, match=r"no column 'prompt' .*columns: data"):
        source_of(tmp_path / "x.json", '{"data": [{"prompt": "x"}]}')


def test_no_rows(tmp_path: Path) -> None:
    assert read(source_of(tmp_path / "x.json", "")) == read(source_of(tmp_path / "y.json", " [ ] ")) == []


def test_one_odd_value_changes_no_other_rows_cell(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{n}", "n": n} for n in range(5)]
    rows[1] |= {"prompt": 42, "n": 2**70}
    source = source_of(tmp_path / "x.json", json.dumps(rows))
    batch = next(source.rows()).key.carried.batch
    assert (source.carried_schema.types, batch.column("n").to_pylist()) == (
        [pa.string(), pa.int64()],
        [0, None, 2, 3, 4],
    )
    assert batch.column("prompt").to_pylist() == ["p0", "42", "p2", "p3", "p4"]


def test_the_rows_of_a_large_array(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "prompt": "p" * (n % 700), "pad": [n] * 20} for n in range(3_000)]
    source = source_of(tmp_path / "x.json", json.dumps(rows))
    found = list(source.rows(skip=range(1_000)))
    assert [row.key.row_id for row in found] == [f"r{n}" for n in range(1_000, 3_000)]
    assert [row.values["prompt"] for row in found if isinstance(row, Row)] == [row["prompt"] for row in rows[1_000:]]
