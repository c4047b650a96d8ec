"""OpenAI batch files: every bad line is one failed row with the code that OpenAI has for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import ErrorCode, FailedRow, Row

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def request(name: Any, url: str = CHAT, model: str | None = "small", **keys: Any) -> dict[str, Any]:
    text = {"messages": [{"role": "user", "content": f"hello {name}"}]} if url == CHAT else {"prompt": f"say {name}"}
    body = {**text, "max_tokens": 4} | ({} if model is None else {"model": model})
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **keys}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def source_of(tmp_path: Path, lines: list[Any], carry: Any = "all", **keys: Any) -> Source:
    path = write(tmp_path / "batch.jsonl", lines)
    return open_source(InputSpec(path=(str(path),), **keys), carry=carry, needed=frozenset(["prompt"]))


def read(tmp_path: Path, lines: list[Any], **keys: Any) -> list[Row | FailedRow]:
    return list(source_of(tmp_path, lines, **keys).rows())


def codes(rows: list[Row | FailedRow]) -> list[ErrorCode | None]:
    return [row.code if isinstance(row, FailedRow) else None for row in rows]


def test_requests_are_rows_with_their_prompt_and_settings(tmp_path: Path) -> None:
    chat, completion = read(tmp_path, [request("a"), request("b", COMPLETIONS)])
    assert isinstance(chat, Row) and isinstance(completion, Row)
    assert (chat.key.row_id, completion.key.row_id) == ("a", "b")
    assert chat.values["messages"] == [{"role": "user", "content": "hello a"}]
    assert completion.values["prompt"] == "say b"
    assert chat.values["sampling"] == completion.values["sampling"] == {"max_tokens": 4}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ('{"custom_id": "x", ', ErrorCode.INVALID_JSON_LINE, "batch.jsonl, line 2: not valid JSON"),
        ('["x"]', ErrorCode.INVALID_JSON_LINE, "a list where an object belongs"),
        (request("a"), ErrorCode.DUPLICATE_CUSTOM_ID, "the id 'a' belongs to an earlier row"),
        (request("x", "/v1/embeddings"), ErrorCode.URL_MISMATCH, "'/v1/embeddings'"),
        (request("x") | {"url": None}, ErrorCode.URL_MISMATCH, "'POST' and null"),
        (request("x", method="GET"), ErrorCode.URL_MISMATCH, "'GET'"),
        (
            request("x", model="large"),
            ErrorCode.MODEL_MISMATCH,
            "body.model is 'large'; one input is for one model, and others name 'small'",
        ),
        (request("x", body={"model": ["small"], "messages": []}), ErrorCode.MODEL_MISMATCH, "['small']"),
        (request(None), ErrorCode.BAD_ID, "'custom_id' is missing or null"),
        (request("x", body=None), ErrorCode.WRONG_TYPE, "body is a NoneType, not an object"),
        (request("x", body={"model": "small"}), ErrorCode.MISSING_PROMPT, "body.messages"),
        (request("x", body={"tools": [{}], "messages": []}), ErrorCode.UNSUPPORTED_PARAMETER, "body.tools"),
        (request("x", extra={"more": 0}), None, ""),
    ],
)
def test_a_bad_line_fails_alone(tmp_path: Path, line: Any, code: ErrorCode | None, words: str) -> None:
    rows = read(tmp_path, [request("a"), line, request("z")])
    assert codes(rows) == [None, code, None]
    if isinstance(rows[1], FailedRow):
        assert words in rows[1].message


def test_a_body_that_cannot_be_written_again_fails(tmp_path: Path) -> None:
    line = json.dumps(request("x")).replace('"hello x"', "[" * 300 + "]" * 300)
    assert codes(read(tmp_path, [request("a"), line])) == [None, ErrorCode.INVALID_JSON_LINE]


def test_failed_lines_keep_their_id_and_columns(tmp_path: Path) -> None:
    _, failed = read(tmp_path, [request("a"), request("x", "/v1/embeddings")])
    assert failed.key.row_id == "x"
    assert failed.key.carried.batch.column("url")[failed.key.carried.offset].as_py() == "/v1/embeddings"


def test_the_model_is_that_of_most_requests_and_may_be_left_out(tmp_path: Path) -> None:
    lines = [request("a", model="odd"), request("b"), request("c"), request("d", model=None)]
    assert codes(read(tmp_path, lines)) == [ErrorCode.MODEL_MISMATCH, None, None, None]
    assert codes(read(tmp_path, [request("a", model=None), request("b", model=None)])) == [None, None]


def test_columns_are_text_and_url_is_always_there(tmp_path: Path) -> None:
    lines = [request("a", note=[1, {"b": None}]), request("b")]
    source = source_of(tmp_path, lines)
    assert source.carried_schema.names == ["custom_id", "method", "url", "body", "note"]
    carried = next(source.rows()).key.carried.batch.to_pylist()
    assert [row["note"] for row in carried] == ['[1,{"b":null}]', None]
    assert json.loads(carried[1]["body"]) == request("b")["body"]
    for carry in ("none", ["url"]):
        assert source_of(tmp_path, lines, carry=carry).carried_schema.names == ["url"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text(content)
    spec = InputSpec(path=(str(path),), format="openai-batch")
    with pytest.raises(InputError, match=r"empty_file: there is no request in batch\.jsonl"):
        open_source(spec, carry="all", needed=frozenset())


def test_a_file_of_bad_lines_alone_has_a_failed_row_for_each(tmp_path: Path) -> None:
    rows = read(tmp_path, ["{", "]"], format="openai-batch")
    assert codes(rows) == [ErrorCode.INVALID_JSON_LINE] * 2


@pytest.mark.parametrize(
    ("lines", "keys", "detected"),
    [
        ([request("a")], {}, True),
        (["{oops", request("a"), request("b", "/v1/embeddings")], {}, True),
        ([request("a")], {"id_column": "custom_id"}, True),
        ([request("a")], {"messages_column": "body.messages"}, False),
        ([request("a")], {"template": "{custom_id}"}, False),
        ([request("a")], {"prompt_column": "custom_id"}, False),
        ([request("a")], {"id_column": None}, False),
        ([request("a")], {"format": "jsonl"}, False),
        ([{"custom_id": "a", "url": "https://example.org/v1/", "body": "page", "prompt": "p"}], {}, False),
        ([{"custom_id": "a", "body": {}, "prompt": "p"}], {}, False),
        ([{"id": "a", "prompt": "p"}] * 2 + [request("a")], {}, False),
        ([], {}, False),
    ],
)
def test_auto_takes_only_what_is_certain(
    tmp_path: Path, lines: list[Any], keys: dict[str, Any], detected: bool
) -> None:
    path = write(tmp_path / "batch.jsonl", lines)
    source = open_source(InputSpec(path=(str(path),), **keys), carry="all", needed=frozenset(["custom_id"]))
    assert source.brings_requests == detected


@pytest.mark.parametrize(
    "keys", [{"prompt_column": "p"}, {"messages_column": "m"}, {"template": "{p}"}, {"id_column": "key"}]
)
def test_keys_that_requests_make_pointless_are_refused(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(keys))}: is set beside format: openai-batch"):
        InputSpec.model_validate({"path": "x.jsonl", "format": "openai-batch", **keys})
