"""JSON Lines: every way a line can be wrong is one failed row, every way a file can be wrong one InputError."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from batchpipe.errors import InputError, JobError
from batchpipe.job.spec import InputSpec
from batchpipe.read.formats.text_rows import SAMPLE_ROWS
from batchpipe.read.source import Source, open_source
from batchpipe.types import ErrorCode, FailedRow, Row

GOOD = b'{"id": "a", "prompt": "one"}'


def source_of(path: Path, carry: Any = "all", **keys: Any) -> Source:
    return open_source(InputSpec(path=(str(path),), **keys), carry=carry, needed=frozenset(["prompt"]))


def rows_of(tmp_path: Path, content: bytes, name: str = "in.jsonl", **keys: Any) -> list[Row | FailedRow]:
    path = tmp_path / name
    path.write_bytes(content)
    return list(source_of(path, **keys).rows())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(rows: list[Row | FailedRow]) -> list[Any]:
    return [row.values["prompt"] if isinstance(row, Row) else row.code for row in rows]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows(tmp_path: Path, content: bytes) -> None:
    assert rows_of(tmp_path, content) == []


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"\n",
        GOOD,  # no line end
        GOOD + b"\r\n",
        b"\xef\xbb\xbf" + GOOD + b"\n",
        b"\n  \n" + GOOD + b"\n\n",
        b'{"id": "a",\r"prompt": "one"}\n',  # a bare carriage return is space, not a line end
    ],
)
def test_one_row(tmp_path: Path, content: bytes) -> None:
    (row,) = rows_of(tmp_path, content)
    assert isinstance(row, Row)
    assert (row.key.index, row.key.row_id, row.values["prompt"]) == (0, "a", "one")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"id": "b", "prompt": "\xff"}', ErrorCode.INVALID_UTF8, "not valid UTF-8 (byte 24)"),
        (b'{"id": "b", "prompt": "\x00"}', ErrorCode.INVALID_JSON, "control character"),
        (b'{"id": "b", "prom', ErrorCode.INVALID_JSON, "not valid JSON"),
        (b'{"id": "b"}{"id": "c"}', ErrorCode.INVALID_JSON, "unexpected content after document"),
        (b'{"prompt": NaN}', ErrorCode.INVALID_JSON, "not valid JSON"),
        (b'{"prompt": -Infinity}', ErrorCode.INVALID_JSON, "not valid JSON"),
        (b'{"prompt": 1e400}', ErrorCode.INVALID_JSON, "infinity"),
        (b'{"prompt": "\\ud800"}', ErrorCode.INVALID_JSON, "surrogate"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", ErrorCode.INVALID_JSON, "depth limit"),
        (b'{"id": "b", "prompt": "x", "prompt": "y"}', ErrorCode.INVALID_JSON, "key 'prompt' is given twice"),
        (b'{"id": "b", "id": "c", "prompt": "x"}', ErrorCode.INVALID_JSON, "key 'id' is given twice"),
        (b"[1]", ErrorCode.NOT_AN_OBJECT, "a list where an object belongs"),
        (b'"text"', ErrorCode.NOT_AN_OBJECT, "a string"),
        (b"12", ErrorCode.NOT_AN_OBJECT, "a number"),
        (b"null", ErrorCode.NOT_AN_OBJECT, "null"),
    ],
)
def test_a_bad_line_is_one_failed_row(tmp_path: Path, line: bytes, code: ErrorCode, words: str) -> None:
    last = b'{"id": "z", "prompt": "two"}\n'
    first, bad, third = rows_of(tmp_path, GOOD + b"\n\n" + line + b"\n" + last)
    assert isinstance(bad, FailedRow)
    assert bad.code == code
    assert bad.message.startswith("in.jsonl, line 3: ")
    assert words in bad.message
    assert (bad.key.index, bad.key.row_id) == (1, "in.jsonl:2")
    assert bad.key.carried.batch.column("prompt")[bad.key.carried.offset].as_py() is None
    assert prompts([first, third]) == ["one", "two"]


def test_a_truncated_last_line_is_a_failed_row(tmp_path: Path) -> None:
    assert prompts(rows_of(tmp_path, GOOD + b'\n{"id": "b", "pro')) == ["one", ErrorCode.INVALID_JSON]


def test_a_key_inside_a_value_is_not_given_twice(tmp_path: Path) -> None:
    line = b'{"id": "a", "prompt": "x", "other": {"prompt": "y", "id": 1}}\n'
    assert prompts(rows_of(tmp_path, line)) == ["x"]


def test_a_message_never_quotes_the_row(tmp_path: Path) -> None:
    bad = rows_of(tmp_path, GOOD + b'\n{"prompt": "my secret" oops}\n')[1]
    assert isinstance(bad, FailedRow)
    assert "secret" not in bad.message


def test_a_line_longer_than_the_limit_is_passed_over(tmp_path: Path) -> None:
    huge = b'{"id": "b", "prompt": "' + b"x" * 5_000_000 + b'"}\n'
    content = GOOD + b"\n" + huge + GOOD.replace(b'"a"', b'"c"') + b"\n" + huge.rstrip()
    rows = rows_of(tmp_path, content, max_line_bytes=1_000_000)
    assert prompts(rows) == ["one", ErrorCode.LINE_TOO_LONG, "one", ErrorCode.LINE_TOO_LONG]
    assert isinstance(rows[1], FailedRow)
    assert rows[1].message == "in.jsonl, line 2: longer than input.max_line_bytes"
    assert len(rows_of(tmp_path, content)[1].values["prompt"]) == 5_000_000  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["a\u2028b\u0085c", "\U0001f600 e\u0301 \u0627\u0644\u0639", "\u0000", "back\\slash"])
def test_text_comes_through_as_it_is(tmp_path: Path, text: str) -> None:
    for ascii_only in (True, False):
        line = json.dumps({"id": "a", "prompt": text}, ensure_ascii=ascii_only).encode()
        assert prompts(rows_of(tmp_path, line + b"\n" + GOOD.replace(b'"a"', b'"b"'))) == [text, "one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match=r"in\.jsonl is UTF-16"):
        rows_of(tmp_path, GOOD.decode().encode(encoding))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
class TestCompressed:
    def test_several_members_are_one_file(self, tmp_path: Path, suffix: str, compress: Any) -> None:
        second = b'{"id": "b", "prompt": "two"}\n'
        content = compress(GOOD + b"\n") + compress(second)
        assert prompts(rows_of(tmp_path, content, f"in.jsonl{suffix}")) == ["one", "two"]

    def test_cut_off(self, tmp_path: Path, suffix: str, compress: Any) -> None:
        content = b"".join(b'{"id": "%d", "prompt": "p%d"}\n' % (n, n * n * 7919) for n in range(60_000))
        path = tmp_path / f"in.jsonl{suffix}"
        path.write_bytes(compress(content)[:-20])
        read = []
        with pytest.raises(InputError, match=r"in\.jsonl.* is damaged or cut off"):
            for row in source_of(path).rows():
                read.append(row)
        assert len(read) > 30_000

    def test_the_name_must_agree(self, tmp_path: Path, suffix: str, compress: Any) -> None:
        with pytest.raises(InputError, match="has the wrong suffix: it does not hold"):
            rows_of(tmp_path, GOOD, f"in.jsonl{suffix}")
        with pytest.raises(InputError, match="has the wrong suffix: it holds"):
            rows_of(tmp_path, compress(GOOD), "in.jsonl")


def test_a_missing_prompt_column_is_told_at_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"id": "a", "promt": "x"}])
    with pytest.raises(InputError, match=r"no column 'prompt'; did you mean 'promt'\? \(columns: id, promt\)"):
        source_of(path)
    with pytest.raises(JobError, match=r"output.columns: the input has no column 'ids'; did you mean 'id'"):
        open_source(InputSpec(path=(str(path),)), carry=["ids"], needed=frozenset(["promt"]))


def test_carried_types_are_those_of_the_first_rows(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "x", "flag": True, "score": 1, "many": [1, "a"], "mixed": 1, "big": 2**63, "none": None},
        {"id": 2, "prompt": "y", "flag": None, "score": 1.5, "many": {"k": None}, "mixed": "1", "big": 1, "none": None},
    ]
    source = source_of(write_rows(tmp_path / "in.jsonl", rows))
    assert source.carried_schema == pa.schema(
        {
            "id": pa.int64(), "prompt": pa.string(), "flag": pa.bool_(), "score": pa.float64(),
            "many": pa.string(), "mixed": pa.string(), "big": pa.string(), "none": pa.string(),
        }
    )  # fmt: skip
    first, second = source.rows()
    assert first.key.row_id == "1"
    batch = second.key.carried.batch
    assert batch.schema == source.carried_schema
    assert batch.to_pylist()[second.key.carried.offset] == {
        "id": 2, "prompt": "y", "flag": None, "score": 1.5,
        "many": '{"k":null}', "mixed": "1", "big": "1", "none": None,
    }  # fmt: skip


def test_a_value_of_another_type_costs_no_row_and_no_other_cell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"id": f"r{n}", "prompt": "x", "n": 1, "late": None} for n in range(SAMPLE_ROWS)]
    rows += [
        {"id": "text", "prompt": "x", "n": "1"},
        {"id": "bool", "prompt": "x", "n": True},
        {"id": "huge", "prompt": "x", "n": 2**63},
        {"id": "float", "prompt": "x", "n": 1.0},
        {"id": "good", "prompt": "x", "n": 7, "late": {"a": 1}, "unknown": 1},
        {"id": "string", "prompt": "x", "n": None, "late": "as it is"},
    ]
    source = source_of(write_rows(tmp_path / "in.jsonl", rows))
    *_, text, boolean, huge, fraction, good, string = source.rows()
    for row in (text, boolean, huge, fraction):
        assert isinstance(row, Row)
        assert row.key.carried.batch["n"][row.key.carried.offset].as_py() is None
    [warning] = caplog.messages
    assert warning.startswith("output.columns: 'n' is int64 in most of the first rows, and a string in row 1001 of in.")
    assert isinstance(good, Row)
    assert good.key.carried.batch.schema.names == ["id", "prompt", "n", "late"]
    carried = good.key.carried.batch.to_pylist()
    assert carried[good.key.carried.offset]["late"] == '{"a":1}'
    assert carried[string.key.carried.offset]["late"] == "as it is"


@pytest.mark.parametrize(
    ("usual", "odd", "carried_odd"),
    [(7, 2**63, None), (7, 2**70, None), (7, "seven", None), (0.5, "half", None), (True, 1, None), ("a", 42, "42")],
)
@pytest.mark.parametrize("place", [0, 1, SAMPLE_ROWS + 1])
def test_one_odd_value_changes_no_other_rows_cell(
    tmp_path: Path, usual: Any, odd: Any, carried_odd: Any, place: int
) -> None:
    rows = [{"id": f"r{n}", "prompt": "x", "n": usual} for n in range(SAMPLE_ROWS + 3)]
    rows[place]["n"] = odd
    source = source_of(write_rows(tmp_path / "in.jsonl", rows))
    cells = [row.key.carried.batch["n"][row.key.carried.offset].as_py() for row in source.rows()]
    assert cells == [usual] * place + [carried_odd] + [usual] * (len(rows) - place - 1)
    assert type(cells[-1]) is type(usual)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is missing or null"),
        ("", "an empty text"),
        (1.5, "holds float"),
        (True, "holds bool"),
        (["a"], "holds list"),
        ("x" * 1025, "has 1,025 characters"),
    ],
)
def test_a_bad_id_fails_its_row(tmp_path: Path, value: Any, words: str) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": value, "prompt": "y"}, {"prompt": "z"}]
    path = write_rows(tmp_path / "in.jsonl", rows)
    good, bad, missing = source_of(path, id_column="id").rows()
    assert isinstance(good, Row)
    for row in (bad, missing):
        assert isinstance(row, FailedRow)
        assert row.code == ErrorCode.BAD_ID
    assert words in bad.message  # type: ignore[union-attr]
    assert (bad.key.row_id, missing.key.row_id) == ("in.jsonl:2", "in.jsonl:3")


@pytest.mark.parametrize("value", [None, "", 1.5, True, ["a"], {"a": 1}, "a"])
def test_ids_that_nobody_asked_for_fail_no_row(tmp_path: Path, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": "x"} for i in ("a", value, value, 2.0)])
    rows = list(source_of(path).rows())
    assert all(isinstance(row, Row) for row in rows)
    assert [row.key.row_id for row in rows] == ["a", "in.jsonl:2", "in.jsonl:3", "2"]
    assert sum("write input.id_column: id to fail them" in warning for warning in caplog.messages) == 1


def test_odd_ids_are_only_texts(tmp_path: Path) -> None:
    ids = ["../../etc/passwd", "a\u0000b", "x" * 1024, 7, -(2**70)]
    rows = source_of(write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": "x"} for i in ids[:4]])).rows()
    assert [row.key.row_id for row in rows] == [*ids[:3], "7"]


def test_a_later_row_of_an_id_fails_even_after_a_skipped_one(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": p} for i, p in (("a", 1), ("b", 2), ("a", 3), (7, 4), ("7", 5))]
    path = write_rows(tmp_path / "in.jsonl", [{**row, "prompt": str(row["prompt"])} for row in rows])
    source = source_of(path, id_column="id")
    assert prompts(list(source.rows())) == ["1", "2", ErrorCode.DUPLICATE_ID, "4", ErrorCode.DUPLICATE_ID]
    b, again, *_ = source.rows(skip={0, 3, 4})
    assert isinstance(again, FailedRow)
    assert (b.key.index, again.key.index, again.key.row_id) == (1, 2, "a")
    assert again.message == "the id 'a' belongs to an earlier row"
    assert source.rows_seen == 5


def test_ids_are_made_of_file_and_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "x"}])
    assert [row.key.row_id for row in source_of(path).rows()] == ["in.jsonl:1", "in.jsonl:2"]
    path = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}] * 2)
    assert [row.key.row_id for row in source_of(path, id_column=None).rows()] == ["in.jsonl:1", "in.jsonl:2"]
    with pytest.raises(InputError, match="has no column 'name'"):
        source_of(path, id_column="name")


def test_limit_counts_rows_and_bounds_progress(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"id": str(n), "prompt": "x"} for n in range(10_000)])
    source = source_of(path, limit=7)
    assert source.num_rows() is None
    assert [row.key.index for row in source.rows(skip={1})] == [0, 2, 3, 4, 5, 6]
    assert (source.rows_seen, source.progress) == (7, 1.0)
    source = source_of(path)
    assert sum(1 for _ in source.rows()) == 10_000
    assert source.progress == 1.0


@pytest.mark.parametrize("num_rows", [500, 3_000, 30_000])
def test_progress_counts_the_rows_that_came_whatever_was_read_at_once(tmp_path: Path, num_rows: int) -> None:
    rows = [{"id": f"{n:05}", "prompt": "x" * 20} for n in range(num_rows)]
    source = source_of(write_rows(tmp_path / "in.jsonl", rows))
    for number, _ in enumerate(source.rows(skip=range(0, num_rows, 2)), start=1):
        if number % 100 == 0:
            assert source.progress == pytest.approx(source.rows_seen / num_rows, abs=2e-3)
    assert source.progress == 1.0


def test_lines_across_blocks_are_whole(tmp_path: Path) -> None:
    texts = ["x" * (n * 997 % 5_000) for n in range(1_000)]
    path = write_rows(tmp_path / "in.jsonl", [{"id": str(n), "prompt": text} for n, text in enumerate(texts)])
    assert path.stat().st_size > 4 * 262_144
    assert prompts(list(source_of(path).rows())) == texts
    assert prompts(list(source_of(path, max_line_bytes=6_000).rows())) == texts


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}])
    source = source_of(path)
    write_rows(path, [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}])
    with pytest.raises(InputError, match=r"in\.jsonl changed while the job was reading it"):
        list(source.rows())


def test_the_fingerprint_is_of_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    path = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}])
    copy = write_rows(tmp_path / "copy" / "in.jsonl", [{"id": "a", "prompt": "x"}])
    before = source_of(path).fingerprint
    assert source_of(copy).fingerprint == before
    write_rows(copy, [{"id": "a", "prompt": "y"}])
    assert source_of(copy).fingerprint != before
