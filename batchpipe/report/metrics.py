"""`_metrics.parquet`: one row for each run of the job. The underscore hides it from readers of the folder's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.report.timeline import Sample
from batchpipe.write.place import Place

FILE_NAME = "_metrics.parquet"
OLD_FILE_NAME = "metrics.parquet"  # of outputs begun before the file had its underscore; read, never written


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """One run. `rows_*` count the job's rows, those of earlier runs included; all other fields are of this run alone.

    Times are UTC. `predictor_mean_absolute_error_tokens` is per completion, `predictor_sum_error` is predicted sum /
    real sum - 1; both are None if nothing was predicted. `stage_utilization` is the fraction of time in which a stage
    computed, for all stages of the first replica, then of the next. Blocks are summed over replicas. Bytes between host
    and device, and the `stall_seconds` in which computing waited for KV, are summed over all stages. `reused_tokens`
    are prompt tokens with KV taken from another prompt with the same prefix. `kv_faults` counts the times that KV of a
    sequence came back from the host with a wrong checksum. `timeline` are samples over `generate_seconds`.
    """

    run_id: str
    job_name: str
    identity_sha256: str
    model: str
    revision: str | None
    versions: Mapping[str, str]
    device_names: tuple[str, ...]
    started_at: datetime
    ended_at: datetime
    load_seconds: float
    generate_seconds: float
    wall_seconds: float
    rows_total: int
    rows_succeeded: int
    rows_failed: int
    rows_canceled: int
    prompt_tokens: int
    completion_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    num_stages: int  # of one model copy
    num_replicas: int
    stage_utilization: tuple[float, ...]
    phase_switches: int
    preemptions: int
    recomputed_tokens: int
    reused_tokens: int
    peak_device_blocks: int
    peak_host_blocks: int
    host_to_device_bytes: int
    device_to_host_bytes: int
    stall_seconds: float
    kv_faults: int
    predictor_mean_absolute_error_tokens: float | None
    predictor_sum_error: float | None
    planner_seconds: float
    timeline: tuple[Sample, ...]

    def __post_init__(self) -> None:
        accounted = self.rows_succeeded + self.rows_failed + self.rows_canceled
        assert self.rows_total == accounted, f"{self.rows_total} rows, but {accounted} accounted for"


_ARROW_TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "datetime": pa.timestamp("us", "UTC"),
    "tuple[str, ...]": pa.list_(pa.string()),
    "tuple[float, ...]": pa.list_(pa.float64()),
    "Mapping[str, str]": pa.map_(pa.string(), pa.string()),
    "tuple[Sample, ...]": pa.list_(
        pa.struct(
            [(field.name, pa.float64() if str(field.type) == "float" else pa.int64()) for field in fields(Sample)]
        )
    ),
}
METRICS_SCHEMA = pa.schema([(field.name, _ARROW_TYPES[str(field.type)]) for field in fields(RunMetrics)])
_TIMES = [field.name for field in METRICS_SCHEMA if pa.types.is_timestamp(field.type)]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Columns that the first version of the file lacks; they are null in its rows.
_ADDED = {"reused_tokens", "kv_faults", "timeline"}


def append_metrics(folder: Place, metrics: RunMetrics) -> None:
    """Adds a row to the folder's metrics, replacing the file as a whole.

    Raises OutputError if the file cannot be read or written.
    """
    row = asdict(metrics) | {"versions": list(metrics.versions.items())}
    table = pa.concat_tables([_read(folder), pa.Table.from_pylist([row], METRICS_SCHEMA)])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    folder.write(FILE_NAME, sink.getvalue().to_pybytes())
    folder.delete(OLD_FILE_NAME)


def read_metrics(folder: Place) -> list[dict[str, Any]]:
    """The metrics of the folder's runs, oldest first."""
    table = _read(folder)
    for name in _TIMES:  # of which pyarrow makes Python's own only with pandas, whose import takes half a second
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.int64()))
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return [row | {name: _EPOCH + timedelta(microseconds=row[name]) for name in _TIMES} for row in rows]


def _read(folder: Place) -> pa.Table:
    file_name, data = FILE_NAME, folder.read(FILE_NAME)
    if data is None:
        file_name, data = OLD_FILE_NAME, folder.read(OLD_FILE_NAME)
    if data is None:
        return METRICS_SCHEMA.empty_table()
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            table = file.read()
            for name in _ADDED - set(table.column_names):
                table = table.append_column(name, pa.nulls(len(table), METRICS_SCHEMA.field(name).type))
            return table.select(METRICS_SCHEMA.names).cast(METRICS_SCHEMA)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise OutputError(f"{folder / file_name}: cannot be read as metrics ({error}); move it away.") from error
