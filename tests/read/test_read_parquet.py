"""Parquet: what a file cannot give is said before the model loads, what a row cannot give fails that row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from batchpipe.errors import InputError, JobError
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import BATCH_ROWS
from batchpipe.read.content import checked_messages
from batchpipe.read.source import Source, open_source
from batchpipe.types import ErrorCode, FailedRow, Row

PROMPTS = pa.table({"id": ["a", "b", "c"], "prompt": ["one", None, "three"]})


def source_of(path: Path, carry: Any = "all", needed: str = "prompt", **keys: Any) -> Source:
    return open_source(InputSpec(path=(str(path),), **keys), carry=carry, needed=frozenset([needed]))


def written(path: Path, table: pa.Table, **keys: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **keys)
    return path


def carried(row: Row | FailedRow) -> dict[str, Any]:
    one: list[dict[str, Any]] = row.key.carried.batch.slice(row.key.carried.offset, 1).to_pylist()
    return one[0]


@pytest.mark.parametrize("has_row_group", [True, False])
def test_no_rows(tmp_path: Path, has_row_group: bool) -> None:
    path = tmp_path / "in.parquet"
    with pq.ParquetWriter(path, PROMPTS.schema) as writer:
        if has_row_group:
            writer.write_table(PROMPTS.slice(0, 0))
    source = source_of(path)
    assert (list(source.rows()), source.num_rows(), source.progress) == ([], 0, 1.0)


def test_rows_ids_and_nulls(tmp_path: Path) -> None:
    source = source_of(written(tmp_path / "in.parquet", PROMPTS))
    rows = list(source.rows())
    assert [row.key.row_id for row in rows] == ["a", "b", "c"]
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == ["one", None, "three"]
    assert (source.num_rows(), source.progress, source.rows_seen) == (3, 1.0, 3)
    assert source_of(tmp_path / "in.parquet", limit=2).num_rows() == 2


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all", "footer", "cut"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: bytes | str) -> None:
    path = written(tmp_path / "in.parquet", PROMPTS)
    content = path.read_bytes()
    if damage == "footer":
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        damage = content[:start] + b"\xff" * 20 + content[start + 20 :]
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else damage)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"in\.parquet cannot be read as Parquet"):
        source_of(path)


def test_damaged_data_is_an_input_error_where_it_is_met(tmp_path: Path) -> None:
    path = written(tmp_path / "in.parquet", pa.table({"prompt": [str(n) * 20 for n in range(20_000)]}))
    content = bytearray(path.read_bytes())
    content[5_000:20_000] = b"\xa5" * 15_000
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"in\.parquet cannot be read as Parquet"):
        list(source_of(path).rows())


class _TestKms(encryption.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return b"0" + key_bytes.hex().encode()

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key[1:].decode())


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    factory = encryption.CryptoFactory(lambda _: _TestKms())
    properties = factory.file_encryption_properties(
        encryption.KmsConnectionConfig(), encryption.EncryptionConfiguration(footer_key="k", uniform_encryption=True)
    )
    path = written(tmp_path / "in.parquet", PROMPTS, encryption_properties=properties)
    with pytest.raises(InputError, match=r"(?i)in\.parquet cannot be read as Parquet.*(encrypt|decrypt)"):
        source_of(path)


def test_an_unsupported_codec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "in.parquet", PROMPTS, compression="brotli")

    class NoCodec:
        is_available = staticmethod(lambda codec: codec != "brotli")

    monkeypatch.setattr(pa, "Codec", NoCodec)
    with pytest.raises(InputError, match="compressed with brotli, which cannot be read here"):
        source_of(path)


def test_a_missing_column_is_named_with_its_neighbour(tmp_path: Path) -> None:
    path = written(tmp_path / "in.parquet", PROMPTS)
    with pytest.raises(InputError, match=r"no column 'prompts'; did you mean 'prompt'\? \(columns: id, prompt\)"):
        source_of(path, needed="prompts")
    with pytest.raises(InputError, match="no column 'key'"):
        source_of(path, id_column="key")
    with pytest.raises(JobError, match="output.columns: the input has no column 'promt'; did you mean 'prompt'"):
        source_of(path, carry=["promt"])


@pytest.mark.parametrize(
    "column", [pa.array([1]), pa.array([b"x"]), pa.array([["x"]]), pa.array([{"a": 1}]), pa.array([1.5])], ids=str
)
def test_a_column_that_can_be_no_prompt_is_refused(tmp_path: Path, column: pa.Array) -> None:
    path = written(tmp_path / "in.parquet", pa.table({"prompt": column}))
    with pytest.raises(InputError, match=r"input.prompt_column: column 'prompt' of .* must be text or a list"):
        source_of(path)


@pytest.mark.parametrize(
    "column_type", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.string()], ids=str
)
def test_every_kind_of_text_is_a_prompt_and_keeps_its_type(tmp_path: Path, column_type: pa.DataType) -> None:
    table = pa.table({"prompt": pa.array(["one", None, "one"]).cast(column_type)})
    source = source_of(written(tmp_path / "in.parquet", table))
    rows = [row for row in source.rows() if isinstance(row, Row)]
    assert [row.values["prompt"] for row in rows] == ["one", None, "one"]
    assert source.carried_schema.field("prompt").type == column_type
    assert rows[0].key.carried.batch.schema == source.carried_schema


def test_token_ids_and_null_columns_may_be_prompts(tmp_path: Path) -> None:
    tokens = pa.table({"prompt": pa.array([[1, 2], None], pa.list_(pa.int32()))})
    rows = [row for row in source_of(written(tmp_path / "a.parquet", tokens)).rows() if isinstance(row, Row)]
    assert [row.values["prompt"] for row in rows] == [[1, 2], None]
    empty = pa.table({"prompt": pa.nulls(2)})
    assert source_of(written(tmp_path / "b.parquet", empty)).num_rows() == 2


def test_text_that_is_not_utf8_fails_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    one, bad, three = source_of(written(tmp_path / "in.parquet", pa.table({"prompt": text}))).rows()
    assert isinstance(bad, FailedRow)
    assert (bad.code, bad.key.row_id) == (ErrorCode.INVALID_UTF8, "in.parquet:2")
    assert isinstance(one, Row) and isinstance(three, Row)
    assert three.values["prompt"] == "three"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(InputError, match="more than one column 'prompt'"):
        source_of(written(tmp_path / "in.parquet", table))


def test_files_of_one_input_have_one_schema(tmp_path: Path) -> None:
    written(tmp_path / "in" / "a.parquet", PROMPTS)
    other = written(tmp_path / "in" / "b.parquet", PROMPTS.append_column("extra", pa.array([1, 2, 3])))
    with pytest.raises(InputError, match=r"column 'extra' is in .*b\.parquet, but not in .*a\.parquet"):
        source_of(tmp_path / "in")
    assert source_of(tmp_path / "in", carry=["id"], id_column=None).num_rows() == 6
    written(other, pa.table({"id": [1, 2, 3], "prompt": ["x"] * 3}))
    with pytest.raises(InputError, match=r"'id' is int64 in .*b\.parquet, but string in .*a\.parquet"):
        source_of(tmp_path / "in")
    written(other, PROMPTS.select(["prompt", "id"]))  # order does not matter
    assert [row.key.row_id for row in source_of(tmp_path / "in", id_column=None).rows()][3:] == [
        f"b.parquet:{n}" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("row_group_size", [1, 7, 1_000_000])
def test_row_groups_of_any_size_are_read_in_small_batches(tmp_path: Path, row_group_size: int) -> None:
    count = 3 * BATCH_ROWS + 5
    table = pa.table({"id": range(count), "prompt": [f"p{n}" for n in range(count)]})
    rows = list(source_of(written(tmp_path / "in.parquet", table, row_group_size=row_group_size)).rows())
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == table["prompt"].to_pylist()
    assert [row.key.index for row in rows] == list(range(count))
    assert max(row.key.carried.batch.num_rows for row in rows) <= BATCH_ROWS
    assert all(carried(row)["id"] == row.key.index for row in rows)


def test_skipped_rows_are_not_given_but_counted(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b", "a"], "prompt": ["x", "y", "z"]})
    source = source_of(written(tmp_path / "in.parquet", table), id_column="id")
    b, again = source.rows(skip={0})
    assert (b.key.index, again.key.index, source.rows_seen) == (1, 2, 3)
    assert isinstance(again, FailedRow)
    assert again.code == ErrorCode.DUPLICATE_ID


def test_carried_columns_keep_values_and_exact_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["x", "y"],
            "when": pa.array([0, None], pa.timestamp("ns", "Europe/Berlin")),
            "price": pa.array(["1.10", "2.20"]).cast(pa.decimal128(9, 2)),
            "raw": pa.array([b"\xff", None], pa.large_binary()),
            "nested": pa.array([[{"a": 1}], []], pa.list_(pa.struct([("a", pa.int8())]))),
            "a.b": pa.array([1, 2], pa.uint16()),
        }
    )
    source = source_of(written(tmp_path / "in.parquet", table))
    assert source.carried_schema == table.schema
    batches = {id(row.key.carried.batch): row.key.carried.batch for row in source.rows()}
    assert pa.Table.from_batches(batches.values()) == table
    assert source_of(tmp_path / "in.parquet", carry="none").carried_schema.names == []
    assert [carried(row) for row in source_of(tmp_path / "in.parquet", carry=["a.b"]).rows()] == [
        {"a.b": 1},
        {"a.b": 2},
    ]


def test_fields_of_other_structs_are_not_there_at_any_depth(tmp_path: Path) -> None:
    tools = [{"name": "add", "parameters": {"a": {"type": "int"}}}, {"name": "say", "parameters": {"b": ["x", None]}}]
    path = written(tmp_path / "structs.parquet", pa.table({"data": [tools, None]}))
    rows = list(source_of(path, needed="data", template="{data}").rows())
    assert [row.values["data"] for row in rows if isinstance(row, Row)] == [tools, None]
    maps = pa.array([[("a", "1"), ("b", None)], None], pa.map_(pa.string(), pa.string()))
    path = written(tmp_path / "maps.parquet", pa.table({"data": maps}))
    rows = list(source_of(path, needed="data", template="{data}").rows())
    assert [row.values["data"] for row in rows if isinstance(row, Row)] == [{"a": "1"}, None]


def test_messages_may_have_null_content(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant"}], None]
    path = written(tmp_path / "in.parquet", pa.table({"chat": messages}))
    rows = list(source_of(path, needed="chat", messages_column="chat").rows())
    assert [row.values["chat"] for row in rows if isinstance(row, Row)] == messages
    with pytest.raises(InputError, match="input.messages_column: column 'chat' of .* must be a list of"):
        source_of(written(path, pa.table({"chat": [1, 2]})), needed="chat", messages_column="chat")


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([json.dumps(CHAT)]),
        pa.array([json.dumps(CHAT)], pa.large_string()),
        pa.array([{"role": [m["role"] for m in CHAT], "content": [m["content"] for m in CHAT]}]),
        pa.array([[list(m.items()) for m in CHAT]], pa.list_(pa.map_(pa.string(), pa.string()))),
    ],
    ids=["json text", "large json text", "struct of lists", "list of maps"],
)
def test_conversations_come_in_many_layouts(tmp_path: Path, column: pa.Array) -> None:
    path = written(tmp_path / "in.parquet", pa.table({"chat": column}))
    [row] = source_of(path, needed="chat", messages_column="chat").rows()
    assert isinstance(row, Row)
    assert checked_messages(row.values["chat"], "chat") == CHAT


class TestHivePartitions:
    def test_folder_names_are_columns(self, tmp_path: Path) -> None:
        table = PROMPTS.drop_columns("id")
        for folder in ("year=2026/kind=a%20b", "year=2027/kind=__HIVE_DEFAULT_PARTITION__"):
            written(tmp_path / "in" / folder / "part-0.parquet", table)
        source = source_of(tmp_path / "in")
        assert source.carried_schema == pa.schema({"prompt": pa.string(), "year": pa.int64(), "kind": pa.string()})
        rows = list(source.rows())
        assert [carried(row)["year"] for row in rows] == [2026] * 3 + [2027] * 3
        assert [carried(row)["kind"] for row in rows] == ["a b"] * 3 + [None] * 3
        assert rows[3].key.row_id == "year=2027/kind=__HIVE_DEFAULT_PARTITION__/part-0.parquet:1"

    def test_a_number_with_leading_zeros_stays_text(self, tmp_path: Path) -> None:
        written(tmp_path / "in" / "code=007" / "a.parquet", PROMPTS)
        assert source_of(tmp_path / "in").carried_schema.field("code").type == pa.string()

    def test_a_clash_with_a_column_of_the_file_is_refused(self, tmp_path: Path) -> None:
        written(tmp_path / "in" / "id=1" / "a.parquet", PROMPTS)
        with pytest.raises(InputError, match=r"column 'id' is in .*a\.parquet and in the names of its folders"):
            source_of(tmp_path / "in")

    def test_all_files_lie_in_folders_of_the_same_names(self, tmp_path: Path) -> None:
        written(tmp_path / "in" / "year=1" / "a.parquet", PROMPTS)
        written(tmp_path / "in" / "b.parquet", PROMPTS)
        with pytest.raises(InputError, match="lies in partition folders"):
            source_of(tmp_path / "in")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "in.parquet", PROMPTS)
    source = source_of(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"in\.parquet changed while the job was reading it"):
        list(source.rows())
