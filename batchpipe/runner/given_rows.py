"""Rows that a Python program brings, as a file that a run reads as any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import InputError
from batchpipe.job import Job
from batchpipe.job.load import Overrides, load_job
from batchpipe.job.spec import InputSpec

# A name that is always the same, so that the same rows are the same input when the job is continued.
_NAME = "rows.parquet"


@contextmanager
def job_with_rows(job: str | Path | Mapping[str, Any] | Job, overrides: Overrides, rows: Any) -> Iterator[Job]:
    """The checked job while the context is open; its input is `rows`, if they are not None, in place of input.path.

    rows: a list of prompts or of mappings, a pandas DataFrame, a `datasets.Dataset` or a pyarrow Table. The other keys
    of the job's input section hold as they are. Raises JobError, and InputError for rows that make no table.
    """
    if rows is None:
        yield load_job(job, overrides)
        return
    with tempfile.TemporaryDirectory(prefix="batchpipe-rows-") as folder:
        path = Path(folder) / _NAME
        if isinstance(overrides, Mapping):
            overrides = {**overrides, "input.path": str(path), "input.format": "parquet"}
        else:
            overrides = [*overrides, f'input.path="{path}"', "input.format=parquet"]
        loaded = load_job(job, overrides)
        pq.write_table(rows_table(rows, loaded.input), path)
        yield loaded


def rows_table(rows: Any, spec: InputSpec) -> pa.Table:
    """A column for each key of the rows; a list of texts becomes the job's prompt column. Raises InputError."""
    try:
        if isinstance(rows, pa.Table):
            return rows
        if hasattr(rows, "with_format") and hasattr(rows, "features"):  # datasets.Dataset
            return rows.with_format("arrow")[:]
        if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas.DataFrame
            return pa.Table.from_pandas(rows, preserve_index=False)
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
            raise TypeError(f"they are a {type(rows).__name__}")
        return _table_of_list([{spec.prompt_column: row} if isinstance(row, str) else row for row in rows], spec)
    except (TypeError, ValueError, pa.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise InputError(
            f"rows: {str(error).splitlines()[0]}; give a list of texts or of mappings with values of one type a key, a "
            "pandas DataFrame, a datasets.Dataset or a pyarrow Table"
        ) from error


def _table_of_list(rows: Sequence[Any], spec: InputSpec) -> pa.Table:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is a {type(row).__name__}")
    names = list(dict.fromkeys(name for row in rows for name in row)) or [spec.prompt_column]
    columns = {name: [row.get(name) for row in rows] for name in names}
    if not rows:
        return pa.table({name: pa.array([], pa.string()) for name in names})
    return pa.table({name: pa.array(values) for name, values in columns.items()})
