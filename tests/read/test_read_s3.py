"""Input in an object store: found, read and fingerprinted as on a disk, and every refusal an error of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from batchpipe.errors import InputError, OutputError
from batchpipe.job.spec import InputSpec
from batchpipe.read.source import Source, open_source
from batchpipe.types import Row
from batchpipe.write.place import open_place
from tests.write.s3_server import s3_server

pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning")

ROWS = [{"id": f"r{n}", "prompt": f"p{n}", "n": n} for n in range(1_500)]


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    with s3_server("rows") as query:
        store, _ = fs.FileSystem.from_uri(f"s3://rows?{query}")
        for part, rows in enumerate((ROWS[:1_100], ROWS[1_100:])):
            with store.open_output_stream(f"rows/parquet/part-{part}.parquet") as stream:
                pq.write_table(pa.Table.from_pylist(rows), stream)
            with store.open_output_stream(f"rows/lines/part-{part}.jsonl") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        for name in ("lines/_SUCCESS", "lines/README.md"):
            with store.open_output_stream(f"rows/{name}") as stream:
                stream.write(b"#")
        yield query


def source_of(address: str, **keys: Any) -> Source:
    spec = InputSpec.model_validate({"path": address, **keys})
    return open_source(spec, carry="all", needed=frozenset(["prompt"]))


@pytest.mark.parametrize("path", ["parquet", "parquet/*.parquet", "lines", "lines/*.jsonl", "*/part-?.jsonl"])
def test_folders_and_patterns_begun_and_continued(query: str, path: str) -> None:
    address = f"s3://rows/{path}?{query}"
    source = source_of(address)
    assert [row.key.row_id for row in source.rows()] == [row["id"] for row in ROWS]
    rest = list(source_of(address).rows(skip=range(1_200)))
    assert [row.values["prompt"] for row in rest if isinstance(row, Row)] == [f"p{n}" for n in range(1_200, 1_500)]
    assert (rest[0].key.index, source_of(address).fingerprint) == (1_200, source.fingerprint)
    assert source.carried_schema == pa.schema({"id": pa.string(), "prompt": pa.string(), "n": pa.int64()})


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://rows/none", "s3://rows/none does not exist"),
        ("s3://nobucket/x.parquet", "s3://nobucket/x.parquet does not exist"),
        ("s3://nobucket/*.parquet", "s3://nobucket/"),
        ("s3://rows/none/*.jsonl", "none"),
    ],
)
def test_what_is_not_there(query: str, address: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        source_of(f"{address}?{query}")
    assert "endpoint_override" not in str(refusal.value)  # options may hold a password


def test_a_store_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    place = open_place(f"s3://rows/x?{options}")
    with ThreadPoolExecutor() as pool:  # each tries for some seconds
        reading = pool.submit(source_of, f"s3://rows/x.parquet?{options}")
        writing = pool.submit(place.write, "_SUCCESS", b"")
    with pytest.raises(InputError, match=r"cannot read s3://rows/x\.parquet"):
        reading.result()
    with pytest.raises(OutputError, match="s3://rows/x/_SUCCESS: the store refuses"):
        writing.result()


def test_addresses_that_no_output_can_have() -> None:
    with pytest.raises(OutputError, match=r"hf upload owner/name FOLDER/completions data --repo-type dataset"):
        open_place("hf://datasets/owner/name")
    with pytest.raises(OutputError, match="is no address that can be written to"):
        open_place("https://host/x")
