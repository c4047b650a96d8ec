"""batchpipe: offline LLM batch inference from a job file to Parquet, without losing a row.

    import batchpipe
    result = batchpipe.run("job.yaml", overrides={"input.limit": 100})
    result.table(); result.to_pandas(); result.metrics; result.path

Importing this loads neither torch nor pyarrow; running a job does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchpipe.job import Job
    from batchpipe.runner.result import Result

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def run(
    job: str | Path | Mapping[str, Any] | Job,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    fresh: bool = False,
    retry_failed: bool = False,
    extend: bool = False,
) -> Result:
    """Runs a job, or continues it; a finished one gives its result again at once.

    job: a job file's path, a mapping of the same shape, or a Job. overrides: {"input.limit": 100} or a list of
    "input.limit=100".
    fresh: moves an earlier output of the same folder aside. retry_failed: rows that failed run again. extend: the job's
    input may have grown by rows or files, or its input.limit been raised. Raises the errors of `batchpipe.errors`.
    """
    from batchpipe.runner.run import run_job

    return run_job(job, overrides, fresh=fresh, retry_failed=retry_failed, extend=extend)
