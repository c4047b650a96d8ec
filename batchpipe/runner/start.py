"""A job from its start: what is finished, or cannot be continued, is told before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchpipe.errors import JobError
from batchpipe.job import Job, load_job
from batchpipe.report.lines import say
from batchpipe.report.metrics import read_metrics
from batchpipe.runner.metrics import Account
from batchpipe.runner.open_job import open_job
from batchpipe.runner.result import Result, exit_code
from batchpipe.write.retry import drop_failed

if TYPE_CHECKING:
    from batchpipe.runner.run import OpenPipelines


def run_job(
    job: str | Path | Mapping[str, Any] | Job,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    fresh: bool = False,
    retry_failed: bool = False,
    extend: bool = False,
    open_pipelines: OpenPipelines | None = None,
) -> Result:
    """See `batchpipe.run`; `open_pipelines` is how tests and simulations bring their own engine."""
    account = Account()
    if fresh and (retry_failed or extend):
        raise JobError("--fresh starts over; leave it out, or leave out --retry-failed and --extend")
    opened = open_job(load_job(job, overrides))
    if fresh:
        opened = replace(opened, started_at=datetime.now().astimezone())
    with ExitStack() as stack:
        # An output that is there is looked at before the tokenizer is loaded; a new one is made when all else is right.
        folder = None
        if opened.output_is_begun and not fresh:
            folder = stack.enter_context(opened.open_output(extend=extend))
            if retry_failed and (num_failed := drop_failed(folder)):
                say(f"{num_failed:,} failed rows run again")
        if folder is not None and folder.finished:
            return Result(folder.place, read_metrics(folder.place)[-1], exit_code(folder.counts))
        from batchpipe.runner.prepare import complete
        from batchpipe.runner.run import open_placed, run_rows

        prepared = complete(opened)
        if folder is None:
            folder = stack.enter_context(opened.open_output(fresh=fresh))
        return run_rows(prepared, folder, account, open_pipelines or open_placed)
