"""From a checked job to what a run stands on: input, model files, tokenizer, prompts, output folder. No weights."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import yaml

import batchpipe
from batchpipe.errors import JobError
from batchpipe.job import Job, Sampling
from batchpipe.job.identity import Identity, identity
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.model.generation_config import job_sampling, with_tokenizers_end
from batchpipe.model.resolve import ResolvedModel, resolve_model
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.placement.devices import resolve_device
from batchpipe.placement.machine import this_machine
from batchpipe.placement.placement import Placement, place
from batchpipe.predict.base import LengthPredictor
from batchpipe.predict.open import open_predictor
from batchpipe.read.openai_body import OVERRIDES
from batchpipe.read.openai_render import RequestRenderer
from batchpipe.read.render import Renderer, needed_columns
from batchpipe.read.source import Source, open_source
from batchpipe.read.tokenize import requests
from batchpipe.sample.detokenize import keeps_special
from batchpipe.sample.reasoning import ReasoningMarkers, markers_of_template
from batchpipe.sample.stop import StopStrings
from batchpipe.sample.text import CompletionTexts
from batchpipe.types import FailedRow, Request
from batchpipe.write.folder import OutputFolder
from batchpipe.write.open import open_output
from batchpipe.write.schema import completions_schema

AUTO_SCHEDULE = "temporal"


@dataclass(frozen=True)
class Prepared:
    """A job whose input can be read and whose model can be described."""

    job: Job
    source: Source
    schema: pa.Schema  # of the completions
    model: ResolvedModel
    info: ModelInfo
    tokenizer: Tokenizer
    renderer: Renderer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.info.eos_token_ids)

    @property
    def schedule(self) -> str:
        schedule = self.job.plan.schedule
        return AUTO_SCHEDULE if schedule == "auto" else schedule

    @property
    def sampling(self) -> Sampling:
        """The job's settings. `column` names what overrides them in a row."""
        sampling = self.job.sampling
        return sampling.model_copy(update={"column": OVERRIDES}) if self.source.brings_requests else sampling

    @property
    def predictor_is_trained(self) -> bool:
        return self.job.predict.method not in ("auto", "none", "quantile")

    def open_predictor(self) -> LengthPredictor | None:
        """A new one each time: it learns from the run that it is opened for. Raises JobError."""
        # A row's own settings may ask for more than the job's.
        of_rows = self.sampling.column is not None
        max_tokens = self.info.max_context_tokens if of_rows else self.sampling.max_tokens
        return open_predictor(self.job.predict.method, self.tokenizer, min(max_tokens, self.info.max_context_tokens))

    @cached_property
    def identity(self) -> Identity:
        return identity(
            self.job,
            model_revision=self.model.revision,
            dtype=self.info.dtype,
            input_fingerprint=self.source.fingerprint,
        )

    def requests(self, skip: Container[int] = frozenset()) -> Iterator[Request | FailedRow]:
        """Every row that is not skipped, ready to run or failed, in input order."""
        return requests(
            self.source.rows(skip),
            self.renderer,
            self.sampling,
            max_context_tokens=self.info.max_context_tokens,
            vocabulary_size=self.info.vocabulary_size,
        )

    @cached_property
    def texts(self) -> CompletionTexts:
        return CompletionTexts(self.tokenizer.decode_batch, self.tokenizer.skipped_tokens)

    @cached_property
    def reasoning(self) -> ReasoningMarkers | None:
        """What parts reasoning from answer, if the job wants them apart. Raises JobError if that cannot be told."""
        wanted = self.job.output.reasoning
        if wanted != "auto":
            return None if wanted is None else ReasoningMarkers(*wanted)
        found = markers_of_template(self.renderer.chat_template or "")
        if found is None:
            raise JobError(
                "output.reasoning: the chat template names no markers of reasoning; write them, as in "
                'output.reasoning: ["<think>", "</think>"]'
            )
        return found

    def matcher_of(self, request: Request) -> StopStrings | None:
        sampling = request.sampling
        if not sampling.stop:
            return None
        keep = keeps_special(request, self.texts, self.reasoning)
        decode = self.texts.decoder(request.prompt_token_ids.tolist(), keep=keep)
        return StopStrings(decode, sampling.stop, sampling.min_tokens)

    def open_output(self, fresh: bool) -> OutputFolder:
        return open_output(
            self.job.output.path,
            identity=self.identity,
            job_yaml=yaml.safe_dump(self.job.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            schema=self.schema,
            provenance={"version": batchpipe.__version__, "model": self.model.name, "revision": self.model.revision},
            fresh=fresh,
        )

    def place(self) -> Placement:
        """On this machine. Raises JobError or MemoryLimitError; see `batchpipe.placement.placement.place`."""
        return place(this_machine(self.job.engine), self.job.engine, self.info, self.num_sequences())

    def num_sequences(self) -> int | None:
        """All samples of all rows, where both are known beforehand."""
        num_rows, sampling = self.source.num_rows(), self.sampling
        return None if num_rows is None or sampling.column is not None else num_rows * sampling.n

    def estimated_rows(self) -> float:
        """Rows of the whole input: counted where that is cheap, else from how much of it was read."""
        num_rows = self.source.num_rows()
        if num_rows is not None:
            return num_rows
        return self.source.rows_seen / max(self.source.progress, 1e-9)


def prepare(job: Job, *, device: str | None = None, needs_weights: bool = True) -> Prepared:
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
    trusted = job.model.trust_remote_code
    info = describe_model(
        model.folder,
        job.model.dtype,
        name=model.name,
        device=device or resolve_device(job.engine),
        trust_remote_code=trusted,
        needs_weights=needs_weights,
        context_tokens=job.model.max_context_tokens,
    )
    tokenizer = load_tokenizer(model.folder, trust_remote_code=trusted)
    ends = with_tokenizers_end(info.eos_token_ids, *tokenizer.end_token)
    info = replace(info, eos_token_ids=tuple(token_id for token_id in ends if token_id < info.vocabulary_size))
    job = job.model_copy(update={"sampling": job_sampling(job.sampling, model.folder)})
    renderer = (RequestRenderer if source.brings_requests else Renderer)(job.input, tokenizer)
    return Prepared(job, source, schema, model, info, tokenizer, renderer)
