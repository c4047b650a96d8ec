"""From a checked job to what tells it from every other: its input, its model's files, its output. No tokenizer.

So a job that is finished, or whose output belongs to another one, is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import yaml

import batchpipe
from batchpipe.errors import JobError
from batchpipe.job import Job
from batchpipe.job.identity import Identity, identity
from batchpipe.model.describe import model_dtype
from batchpipe.model.generation_config import job_sampling
from batchpipe.model.resolve import ResolvedModel, resolve_model
from batchpipe.placement.devices import resolve_device
from batchpipe.read.render import needed_columns
from batchpipe.read.source import Source, open_source
from batchpipe.write.folder import OutputFolder
from batchpipe.write.open import first_start, is_begun, open_output
from batchpipe.write.schema import completions_schema


@dataclass(frozen=True)
class OpenedJob:
    """A job whose input can be read and whose model is here."""

    job: Job
    source: Source
    schema: pa.Schema  # of the completions
    model: ResolvedModel
    device: str  # cpu or cuda
    dtype: str
    started_at: datetime  # for the first time; a chat template that writes a date writes this one

    @cached_property
    def identity(self) -> Identity:
        return identity(
            self.job,
            model_revision=self.model.revision,
            dtype=self.dtype,
            input_fingerprint=self.source.fingerprint,
        )

    @property
    def output_is_begun(self) -> bool:
        """Whether a run has written to the output folder, of this job or of another one."""
        return is_begun(self.job.output.path)

    def open_output(self, *, fresh: bool = False, extend: bool = False) -> OutputFolder:
        marked = self.source.marked
        return open_output(
            self.job.output.path,
            identity=self.identity,
            job_yaml=yaml.safe_dump(self.job.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            schema=self.schema,
            provenance={"version": batchpipe.__version__, "model": self.model.name, "revision": self.model.revision},
            input_files=[] if marked is None else marked.marks,
            compare_input=None if marked is None else marked.change_since,
            fresh=fresh,
            extend=extend,
            started_at=self.started_at,
        )


def open_job(job: Job, *, device: str | None = None, needs_weights: bool = True) -> OpenedJob:
    """Opens input and model files, the input first: what cannot be read is told before anything is fetched.

    device: `cpu` or `cuda` of another machine; None: what the job takes here.
    needs_weights: false for a plan, which can do without (`batchpipe.model.describe.describe_model`).
    Raises InputError, JobError or ModelError.
    """
    source = open_source(
        job.input,
        carry=job.output.columns,
        needed=needed_columns(job.input, job.sampling.column),
        exclude=None if "://" in job.output.path else Path(job.output.path),
    )
    if source.brings_requests and job.sampling.column is not None:
        raise JobError("sampling.column: the input's requests bring their own settings; remove it")
    rows_choose = source.brings_requests or job.sampling.column is not None
    with_logprobs = job.sampling.logprobs > 0 or rows_choose
    schema = completions_schema(
        source.carried_schema,
        with_logprobs,
        with_reasoning=job.output.reasoning is not None,
        prefix=job.output.prefix,
    )
    model = resolve_model(job.model, needs_weights=needs_weights)
    device = device or resolve_device(job.engine)
    dtype = model_dtype(model.folder, job.model.dtype, device=device, needs_weights=needs_weights)
    job = job.model_copy(update={"sampling": job_sampling(job.sampling, model.folder)})
    started_at = first_start(job.output.path) or datetime.now().astimezone()
    return OpenedJob(job, source, schema, model, device, dtype, started_at)
