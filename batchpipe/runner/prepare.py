"""From an opened job to what a run stands on beside weights: the model's description, its tokenizer, prompts."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

from batchpipe.errors import JobError
from batchpipe.job import Job, Sampling
from batchpipe.model.architectures import SUPPORTED, check_supported
from batchpipe.model.checkpoint import has_weights, read_json
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.model.generation_config import with_tokenizers_end
from batchpipe.model.text_part import text_settings
from batchpipe.model.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from batchpipe.model.without_torch import keep_torch_out
from batchpipe.placement.machine import this_machine
from batchpipe.placement.placement import JobBlocks, Placement, place
from batchpipe.predict.base import LengthPredictor
from batchpipe.predict.open import open_predictor
from batchpipe.read.openai_body import OVERRIDES
from batchpipe.read.openai_render import RequestRenderer
from batchpipe.read.render import Renderer
from batchpipe.read.tokenize import requests
from batchpipe.runner.open_job import OpenedJob, open_job
from batchpipe.sample.detokenize import keeps_special
from batchpipe.sample.reasoning import ReasoningMarkers, markers_of_template
from batchpipe.sample.stop import StopStrings
from batchpipe.sample.text import CompletionTexts
from batchpipe.types import FailedRow, Request

logger = logging.getLogger(__name__)

AUTO_SCHEDULE = "temporal"


@dataclass(frozen=True)
class Prepared(OpenedJob):
    """An opened job whose model is described and whose rows can be made requests."""

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

    def place(self, job_blocks: JobBlocks | None = None) -> Placement:
        """On this machine. Raises JobError or MemoryLimitError; see `batchpipe.placement.placement.place`."""
        engine = self.job.engine
        return place(this_machine(engine), engine, self.info, self.num_sequences(), job_blocks)

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


def prepare(job: Job) -> Prepared:
    """Opens a job and completes it, as a run does."""
    return complete(open_job(job))


def complete(opened: OpenedJob, *, needs_weights: bool = True, computes: bool = True) -> Prepared:
    """Loads the configuration and the tokenizer of an opened job's model.

    needs_weights: as in `open_job`.
    computes: false where this process is ours alone and will run no model; then torch is not imported if that can be
    helped. Raises JobError or ModelError.
    """
    model, job = opened.model, opened.job
    trusted = job.model.trust_remote_code
    config = text_settings(read_json(model.folder / "config.json"))
    is_tested = config.get("model_type") in SUPPORTED
    # A model's own code may import torch; without weights torch makes the model; with a GPU torch was asked for it.
    if not computes and not trusted and is_tested and has_weights(model.folder) and opened.device == "cpu":
        keep_torch_out()
    if not is_tested:
        check_supported(config, trust_remote_code=trusted)
        from batchpipe.model.unlisted.self_check import check_unlisted  # needs torch

        check_unlisted(model.folder, trust_remote_code=trusted)
    info = describe_model(
        model.folder,
        job.model.dtype,
        name=model.name,
        device=opened.device,
        trust_remote_code=trusted,
        needs_weights=needs_weights,
        context_tokens=job.model.max_context_tokens,
    )
    tokenizer = load_tokenizer(model.folder, trust_remote_code=trusted)
    tokenizer.template_time = opened.started_at
    check_vocabulary(tokenizer, info.vocabulary_size, model.folder)
    ends = with_tokenizers_end(info.eos_token_ids, *tokenizer.end_token)
    info = replace(info, eos_token_ids=tuple(token_id for token_id in ends if token_id < info.vocabulary_size))
    renderer = (RequestRenderer if opened.source.brings_requests else Renderer)(job.input, tokenizer)
    if job.sampling.n > 1 and job.sampling.temperature == 0:
        logger.warning(
            "sampling.n is %d and sampling.temperature 0: the samples of a row are all the same; set a temperature",
            job.sampling.n,
        )
    known = {field.name: getattr(opened, field.name) for field in fields(OpenedJob)}
    return Prepared(**known, info=info, tokenizer=tokenizer, renderer=renderer)
