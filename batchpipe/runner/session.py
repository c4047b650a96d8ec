"""A model that stays loaded between calls, for notebooks and programs that bring rows again and again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from batchpipe.errors import JobError, WorkerError
from batchpipe.job import Job
from batchpipe.job.load import Overrides, load_job
from batchpipe.pipeline.base import Pipeline
from batchpipe.placement.machine import this_machine
from batchpipe.placement.placement import Placement, place
from batchpipe.runner.given_rows import job_with_rows
from batchpipe.runner.open_job import open_job
from batchpipe.runner.prepare import complete
from batchpipe.runner.run import OpenPipelines, open_placed
from batchpipe.runner.start import run_job
from batchpipe.types import Step, StepResult

# What a job of a session needs not say, as rows come from the program and completions go back to it.
_UNSAID = {"input": {"path": "rows.parquet"}, "output": {"path": "completions"}}


class Session:
    """See `batchpipe.open`. Leave it as a context manager, which ends every process and frees all memory."""

    def __init__(
        self,
        job: str | Path | Mapping[str, Any] | Job,
        overrides: Overrides = (),
        *,
        open_pipelines: OpenPipelines = open_placed,
    ) -> None:
        """Loads the model. Raises what a run would raise before its first row, and JobError for offloaded KV."""
        if isinstance(job, Mapping):
            job = {**job, **{key: {**default, **job.get(key, {})} for key, default in _UNSAID.items()}}
        self._job = load_job(job, overrides)
        if self._job.engine.kv_host_memory:
            raise JobError(
                "engine.kv_host_memory: a session keeps KV on the device; leave it out, or use batchpipe.run"
            )
        with job_with_rows(self._job, {"output.path": "completions"}, []) as empty:
            prepared = complete(open_job(empty))
        engine = self._job.engine
        # For whatever rows may come, so no row's number or length bounds the KV.
        self._pipelines = [
            _Kept(pipeline) for pipeline in open_pipelines(place(this_machine(engine), engine, prepared.info))
        ]

    def generate(self, rows: Any, overrides: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The completions of `rows`, a mapping each with the columns of the output, in the order of the input.

        rows: as of `batchpipe.run`. overrides: keys of the sections input, sampling and output for this call alone.
        """
        given = dict(overrides or {})
        if wrong := [key for key in given if not key.startswith(("input.", "sampling.", "output."))]:
            raise JobError(f"override {wrong[0]}: the model stays as it was loaded; open another session")
        with tempfile.TemporaryDirectory(prefix="batchpipe-completions-") as folder:
            with job_with_rows(self._job, {**given, "output.path": f"{folder}/output"}, rows) as job:
                result = run_job(job, open_pipelines=self._placed)
            completions: list[dict[str, Any]] = result.table().to_pylist()
        return completions

    def _placed(self, placement: Placement) -> Sequence[Pipeline]:
        assert self._pipelines, "the session is closed"
        return self._pipelines

    def close(self) -> None:
        """Frees everything; the session generates no more."""
        while self._pipelines:
            self._pipelines.pop().pipeline.__exit__(None, None, None)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Kept:
    """A pipeline that outlives the runs that it serves; see `Pipeline` for what it does."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline.__enter__()
        self._num_in_flight = 0

    def submit(self, step: Step) -> None:
        self.pipeline.submit(step)
        self._num_in_flight += 1

    def collect(self) -> StepResult:
        result = self.pipeline.collect()
        self._num_in_flight -= 1
        return result

    def restart(self) -> None:
        self._num_in_flight = 0
        self.pipeline.restart()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stays open; steps of a run that was stopped are finished, so that the next one finds none in flight."""
        while self._num_in_flight and not isinstance(error, WorkerError):
            self.collect()
