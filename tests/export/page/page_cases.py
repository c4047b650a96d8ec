"""Output folders as a run leaves them, with made-up completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.report.metrics import append_metrics
from batchpipe.write.place import open_place
from batchpipe.write.schema import completions_schema
from tests.report.run_metrics_case import RUN_METRICS

SCHEMA = completions_schema(pa.schema([("prompt", pa.string())]), False)


def done(index: int, completion_tokens: int, predicted: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "row_id": f"r{index}", "row_index": index, "sample_index": 0, "status": "succeeded", "completion": "some text",
        "finish_reason": "stop", "prompt_tokens": 10 + index, "completion_tokens": completion_tokens,
        "predicted_tokens": predicted, **changes,
    }  # fmt: skip


def failed(index: int, code: str, message: str) -> dict[str, Any]:
    return {
        "row_id": f"r{index}", "row_index": index, "sample_index": 0, "status": "failed", "error_code": code,
        "error_message": message,
    }  # fmt: skip


def make_output(folder: Path, parts: Sequence[Sequence[Mapping[str, Any]]], *, num_runs: int = 1) -> Path:
    """A finished output; without a commit log, as a kill may leave it."""
    (folder / "_batchpipe").mkdir(parents=True)
    (folder / "_batchpipe" / "identity.json").write_text("{}")
    (folder / "completions").mkdir()
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist(list(rows), SCHEMA)
        pq.write_table(table, folder / "completions" / f"part-{number:05d}.parquet")
    for _ in range(num_runs):
        append_metrics(open_place(str(folder)), RUN_METRICS)
    (folder / "_SUCCESS").write_text("")
    return folder
