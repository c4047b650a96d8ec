import os
from pathlib import Path

import pyarrow as pa
import pytest

from batchpipe.errors import OutputError
from batchpipe.write.row_log import MAGIC, RowLog, read_log
from batchpipe.write.schema import to_batch
from tests.write.completion_cases import SCHEMA, outcomes_of


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    """A log of three frames with two rows each."""
    log = RowLog(tmp_path / "rows-00000.log", SCHEMA)
    for start in (0, 2, 4):
        log.append(to_batch(outcomes_of([start, start + 1]), SCHEMA))
    log.sync()
    log.close()
    return log.path


def rows_of(batches: list[pa.RecordBatch]) -> list[int]:
    return [index for batch in batches for index in batch.column("row_index").to_pylist()]


def test_gives_back_what_was_appended(log_path: Path) -> None:
    batches = read_log(log_path, SCHEMA)
    assert pa.Table.from_batches(batches) == pa.Table.from_batches([to_batch(outcomes_of(range(6)), SCHEMA)])


def test_a_tail_torn_at_any_byte_costs_only_the_torn_frame(tmp_path: Path) -> None:
    schema = pa.schema([("row_index", pa.int64())])  # few bytes, so that every one of them can be tried
    log = RowLog(tmp_path / "log", schema)
    ends = []
    for index in range(3):
        log.append(pa.RecordBatch.from_pydict({"row_index": [index]}, schema))
        ends.append(log.path.stat().st_size)
    log.close()
    data = log.path.read_bytes()
    for length in range(len(data)):
        log.path.write_bytes(data[:length])
        assert rows_of(read_log(log.path, schema)) == list(range(sum(end <= length for end in ends)))


def test_a_tail_of_zeros_is_a_torn_tail(log_path: Path) -> None:
    log_path.write_bytes(log_path.read_bytes() + bytes(4096))
    assert rows_of(read_log(log_path, SCHEMA)) == list(range(6))


def test_damage_before_good_rows_is_an_error_with_file_and_offset(log_path: Path) -> None:
    data = bytearray(log_path.read_bytes())
    second = data.index(MAGIC, 1)
    data[second + 40] ^= 1
    log_path.write_bytes(data)
    with pytest.raises(OutputError, match=rf"rows-00000\.log: damaged at byte {second}, with good rows behind"):
        read_log(log_path, SCHEMA)


def test_rows_of_another_schema_are_refused(log_path: Path) -> None:
    with pytest.raises(OutputError, match="holds rows with other columns"):
        read_log(log_path, SCHEMA.append(pa.field("more", pa.int8())))


def test_dictionaries_that_change_from_frame_to_frame(tmp_path: Path) -> None:
    batches = [pa.RecordBatch.from_pydict({"a": pa.array(words).dictionary_encode()}) for words in (["x", "y"], ["z"])]
    log = RowLog(tmp_path / "log", batches[0].schema)
    for batch in batches:
        log.append(batch)
    log.close()
    assert [batch.to_pylist() for batch in read_log(log.path, batches[0].schema)] == [b.to_pylist() for b in batches]


def test_a_disk_that_takes_half_a_frame_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, bytes(data)[:100]))
    log = RowLog(tmp_path / "log", SCHEMA)
    log.append(to_batch(outcomes_of([3]), SCHEMA))
    log.close()
    assert rows_of(read_log(log.path, SCHEMA)) == [3]
