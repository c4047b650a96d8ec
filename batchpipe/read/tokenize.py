"""Rows to requests: prompts as token ids that fit the model, with the sampling settings of their row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import orjson

from batchpipe.errors import JobError, RowError
from batchpipe.job.sampling import Sampling
from batchpipe.read.nested import value_at
from batchpipe.read.render import Renderer
from batchpipe.types import ErrorCode, FailedRow, Request, Row, SamplingParams

BATCH_ROWS = 256


def requests(
    rows: Iterator[Row | FailedRow],
    renderer: Renderer,
    sampling: Sampling,
    *,
    max_context_tokens: int,
    vocabulary_size: int,
) -> Iterator[Request | FailedRow]:
    """Each row as a request, or as a failed row with the number of samples it would have had; in the order of `rows`.

    Raises JobError if the job's own sampling settings name tokens outside the vocabulary.
    """
    settings = _RowSampling(sampling, vocabulary_size)
    for row, prompt in tokenized(rows, renderer):
        params = settings.job_params
        if isinstance(row, FailedRow):
            yield row if params.n == 1 else replace(row, num_samples=params.n)
            continue
        try:
            params = settings.of(row.values)
            if isinstance(prompt, RowError):
                raise prompt
            _check_prompt(prompt, max_context_tokens, vocabulary_size)
        except RowError as error:
            yield FailedRow(row.key, error.code, error.message, params.n)
            continue
        free_tokens = max_context_tokens - len(prompt)
        if params.max_tokens > free_tokens:
            params = replace(params, max_tokens=free_tokens)
        yield Request(row.key, np.array(prompt, dtype=np.int32), params)


def tokenized(
    rows: Iterator[Row | FailedRow], renderer: Renderer
) -> Iterator[tuple[Row | FailedRow, list[int] | RowError]]:
    """Each row with its prompt's token ids, or the reason why it has none; [] for a failed row.

    The texts of BATCH_ROWS rows are encoded at once.
    """
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        prompts: list[str | list[int] | RowError] = []
        for row in batch:
            try:
                prompts.append([] if isinstance(row, FailedRow) else renderer.render(row.values))
            except RowError as error:
                prompts.append(error)
        encoded = iter(renderer.encode([prompt for prompt in prompts if isinstance(prompt, str)]))
        for row, prompt in zip(batch, prompts, strict=True):
            yield row, next(encoded) if isinstance(prompt, str) else prompt


class _RowSampling:
    """The sampling settings of each row: the job's, or the job's with what the row's column overrides."""

    def __init__(self, sampling: Sampling, vocabulary_size: int) -> None:
        self._sampling = sampling
        self._vocabulary_size = vocabulary_size
        self.job_params = sampling.params()
        try:
            self._check(self.job_params)
        except RowError as error:
            raise JobError(f"sampling.{error.message}") from error

    def of(self, values: Mapping[str, Any]) -> SamplingParams:
        column = self._sampling.column
        given = value_at(values, column) if column is not None else None
        if given is None:
            return self.job_params
        if isinstance(given, str):
            try:
                given = orjson.loads(given)
            except orjson.JSONDecodeError as error:
                _refuse(f"column {column!r} is not valid JSON: {error}", error)
        if isinstance(given, list) and all(isinstance(pair, tuple) for pair in given):
            given = dict(given)  # an Arrow map
        if not isinstance(given, dict):
            _refuse(f"column {column!r} holds a {type(given).__name__}, not an object of sampling settings")
        params = self._sampling.override({key: _without_pandas(value) for key, value in given.items()}).params()
        self._check(params)
        return params

    def _check(self, params: SamplingParams) -> None:
        for key, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in token_ids:
                if not 0 <= token_id < self._vocabulary_size:
                    _refuse(f"{key}: token id {token_id} is outside the vocabulary of {self._vocabulary_size:,}")
        if params.logprobs > self._vocabulary_size:
            _refuse(f"logprobs: {params.logprobs} is more than the vocabulary's {self._vocabulary_size:,} tokens")


def _without_pandas(value: Any) -> Any:
    """pandas makes doubles of whole numbers where a column has nulls, and NaN of the nulls."""
    if not isinstance(value, float):
        return value
    return None if value != value else int(value) if value.is_integer() else value


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise RowError(ErrorCode.INVALID_SAMPLING, message) from cause


def _check_prompt(token_ids: list[int], max_context_tokens: int, vocabulary_size: int) -> None:
    if not token_ids:
        raise RowError(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")
    if len(token_ids) >= max_context_tokens:
        message = (
            f"the prompt has {len(token_ids):,} tokens; the model's context of {max_context_tokens:,} "
            f"leaves room for at most {max_context_tokens - 1:,}"
        )
        raise RowError(ErrorCode.PROMPT_TOO_LONG, message)
    if min(token_ids) < 0 or max(token_ids) >= vocabulary_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocabulary_size)
        message = f"token id {wrong} of the prompt is outside the vocabulary of {vocabulary_size:,}"
        raise RowError(ErrorCode.INVALID_TOKEN, message)
