"""batchpipe: offline LLM batch inference from a job file to Parquet, without losing a row.

    import batchpipe
    result = batchpipe.run("job.yaml", overrides={"input.limit": 100})
    result.table(); result.to_pandas(); result.metrics; result.path

    batchpipe.run(job, rows=frame)          # a list, a pandas DataFrame, a datasets.Dataset or a pyarrow Table
    batchpipe.validate(job); batchpipe.plan(job); batchpipe.status("runs/my-job")
    with batchpipe.open(job) as engine:     # the model stays loaded
        engine.generate(["one prompt", "another"])

Importing this loads neither torch nor pyarrow; running a job does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchpipe.job import Job
    from batchpipe.runner.result import Result
    from batchpipe.runner.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "open", "plan", "run", "status", "validate"]


def run(
    job: str | Path | Mapping[str, Any] | Job,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    rows: Any = None,
    fresh: bool = False,
    retry_failed: bool = False,
    extend: bool = False,
) -> Result:
    """Runs a job, or continues it; a finished one gives its result again at once.

    job: a job file's path, a mapping of the same shape, or a Job. overrides: {"input.limit": 100} or a list of
    "input.limit=100". rows: a list of prompts or of mappings, a pandas DataFrame, a `datasets.Dataset` or a pyarrow
    Table, in place of the job's input.path.
    fresh: moves an earlier output of the same folder aside. retry_failed: rows that failed run again. extend: the job's
    input may have grown by rows or files, or its input.limit been raised. Raises the errors of `batchpipe.errors`.
    """
    from batchpipe.runner.given_rows import job_with_rows
    from batchpipe.runner.start import run_job

    with job_with_rows(job, overrides, rows) as loaded:
        return run_job(loaded, fresh=fresh, retry_failed=retry_failed, extend=extend)


def validate(
    job: str | Path | Mapping[str, Any] | Job, overrides: Mapping[str, Any] | Sequence[str] = (), *, rows: Any = None
) -> dict[str, Any]:
    """What `batchpipe validate` prints: rows, tokens, what would fail and why. Arguments as of `run`."""
    from batchpipe.commands.validate import validate_job
    from batchpipe.runner.given_rows import job_with_rows

    with job_with_rows(job, overrides, rows) as loaded:
        return validate_job(loaded)


def plan(
    job: str | Path | Mapping[str, Any] | Job,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    rows: Any = None,
    hardware: str | None = None,
) -> dict[str, Any]:
    """What `batchpipe plan` prints as JSON. hardware: another machine, as in "4xl20". Other arguments as of `run`."""
    from batchpipe.commands.plan import plan_job
    from batchpipe.runner.given_rows import job_with_rows

    with job_with_rows(job, overrides, rows) as loaded:
        return plan_job(loaded, hardware)


def status(folder: str | Path) -> dict[str, Any]:
    """What `batchpipe status --json` prints of an output folder, also while a run fills it."""
    from batchpipe.commands.status import status_of

    return status_of(folder)


def open(  # noqa: A001  # as in `batchpipe.open`
    job: str | Path | Mapping[str, Any] | Job, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Session:
    """Loads the model of a job and keeps it: `with batchpipe.open(job) as engine: engine.generate(rows)`.

    A mapping needs no input and no output section. The other arguments are as of `run`.
    """
    from batchpipe.runner.session import Session

    return Session(job, overrides)
