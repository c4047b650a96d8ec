"""Outcomes and output folders for the tests of write, status and result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import batchpipe
from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity
from batchpipe.types import (
    Carried,
    ErrorCode,
    FinishReason,
    Outcome,
    RowKey,
    RowStatus,
    SampleOutcome,
    TokenLogprobs,
)
from batchpipe.write.folder import OutputFolder
from batchpipe.write.open import open_output
from batchpipe.write.schema import completions_schema
from batchpipe.write.writer import CompletionWriter

REPOSITORY = Path(__file__).parents[2]
IDENTITY = Identity({"model.name": "tiny", "sampling.temperature": 0.0})
CARRIED = pa.schema([("topic", pa.string()), ("score", pa.float64())])
SCHEMA = completions_schema(CARRIED, with_logprobs=False)


def sample(status: RowStatus = RowStatus.SUCCEEDED, logprobs: tuple[TokenLogprobs, ...] = ()) -> SampleOutcome:
    if status is RowStatus.SUCCEEDED:
        return SampleOutcome(status, "forty-two", FinishReason.STOP, None, None, 3, logprobs)
    return SampleOutcome(status, None, None, ErrorCode.EMPTY_PROMPT, "the prompt is empty", None)


def carried_batch(num_rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([f"topic {i}" for i in range(num_rows)]), pa.array([i / 2 for i in range(num_rows)])], schema=CARRIED
    )


def outcomes_of(indexes: Iterable[int], num_samples: int = 1) -> list[Outcome]:
    """Row i is named "row i" and carries ("topic i", i / 2); every seventh failed."""
    indexes = list(indexes)
    batch = carried_batch(max(indexes, default=0) + 1)
    return [
        Outcome(
            RowKey(index, f"row {index}", Carried(batch, index)),
            prompt_tokens=5,
            predicted_tokens=None,
            samples=(sample(RowStatus.FAILED if index % 7 == 0 else RowStatus.SUCCEEDED),) * num_samples,
        )
        for index in indexes
    ]


def open_folder(
    path: str | Path, *, identity: Identity = IDENTITY, schema: pa.Schema = SCHEMA, fresh: bool = False
) -> OutputFolder:
    return open_output(
        path,
        identity=identity,
        job_yaml="version: 1\n",
        schema=schema,
        provenance={"version": batchpipe.__version__, "model": "tiny", "revision": "abc"},
        fresh=fresh,
    )


def run_job(path: str | Path, total_rows: int, part_rows: int = 10, write_rows: int = 3, fresh: bool = False) -> None:
    """What a run does with its folder: only what has no outcome yet is written, a few rows at a time."""
    with open_folder(path, fresh=fresh) as folder, CompletionWriter(folder, part_rows) as writer:
        missing = [index for index in range(total_rows) if index not in folder.done]
        for start in range(0, len(missing), write_rows):
            writer.write(outcomes_of(missing[start : start + write_rows]))
        writer.finish(total_rows)


def read_completions(path: Path) -> pa.Table:
    parts = sorted((path / "completions").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part, partitioning=None) for part in parts]).sort_by("row_index")


def row_indexes(path: Path) -> list[int]:
    indexes: list[int] = read_completions(path).column("row_index").to_pylist()
    return indexes


def run_in_a_process(
    path: Path, total_rows: int, prelude: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    code = (
        f"{prelude}\nimport sys, pathlib\nfrom tests.write.completion_cases import run_job\n"
        "run_job(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, path, str(total_rows)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class Died(OutputError):
    """Stands for the death of the process: nothing more reaches the disk after it."""


def fail_at(wanted: str, occurrence: int) -> Callable[[str], None]:
    passed: list[str] = []

    def crash_point(name: str) -> None:
        passed.append(name)
        if passed.count(wanted) >= occurrence:
            raise Died(name)

    return crash_point
