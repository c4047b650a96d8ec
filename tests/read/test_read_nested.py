"""Columns named by a path, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.nested import root_of, value_at
from batchpipe.read.render import needed_columns
from batchpipe.read.source import Source, open_source
from batchpipe.types import Row

ROWS = [
    {"prompt": {"text": "hello", "score": 1}, "body": {"messages": [{"role": "user", "content": "hi"}]}},
    {"prompt": {"text": "bye", "score": 2}, "body": {"messages": [{"role": "user", "content": "ho"}]}},
]


def source_of(tmp_path: Path, suffix: str, **keys: str) -> Source:
    path = tmp_path / f"in.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    spec = InputSpec(path=(str(path),), **keys)  # type: ignore[arg-type]
    return open_source(spec, carry="all", needed=needed_columns(spec, None))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({"prompt_column": "prompt.text"}, "prompt.text", "bye"),
        ({"messages_column": "body.messages"}, "body.messages", [{"role": "user", "content": "ho"}]),
        ({"template": "{prompt.text} {prompt.score}"}, "prompt.score", 2),
    ],
)
def test_a_path_names_a_field(tmp_path: Path, suffix: str, keys: dict[str, str], name: str, value: object) -> None:
    _, row = source_of(tmp_path, suffix, **keys).rows()
    assert isinstance(row, Row)
    assert value_at(row.values, name) == value


@pytest.mark.parametrize("name", ["prompt.txt", "prompt.text.more"])
def test_a_field_that_is_not_there_is_told_before_any_row(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"has no field '{name}'; its column is struct"):
        source_of(tmp_path, "parquet", prompt_column=name)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_root_that_is_not_there_is_told(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=r"has no column 'promt.text'"):
        source_of(tmp_path, suffix, prompt_column="promt.text")


def test_the_whole_name_comes_first() -> None:
    assert root_of("a.b.c", ["a", "a.b"]) == "a.b"
    assert value_at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert value_at({"a": [("b", 3)]}, "a.b") == 3  # a map
    assert value_at({"a": None}, "a.b") is None
    assert value_at({"a": "text"}, "a.b.c") is None
