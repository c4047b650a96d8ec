"""Rows to requests: prompts as token ids that fit the model, with the sampling settings of their row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from batchpipe.errors import JobError, RowError
from batchpipe.job.sampling import Sampling
from batchpipe.read.render import Renderer
from batchpipe.types import ErrorCode, FailedRow, Request, Row, RowKey, SamplingParams

BATCH_ROWS = 256


def requests(
    rows: Iterator[Row | FailedRow],
    renderer: Renderer,
    sampling: Sampling,
    *,
    max_context_tokens: int,
    vocabulary_size: int,
) -> Iterator[Request | FailedRow]:
    """Each row as a request, or as a failed row with as many samples as it would have had; in the order of `rows`.

    Raises JobError where the job's own sampling names tokens that the vocabulary does not have.
    """
    row_sampling = _RowSampling(sampling, vocabulary_size)
    limits = _Limits(max_context_tokens, vocabulary_size)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        prompts = [_prompt(row, renderer) for row in batch]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(renderer.encode(texts))
        for row, prompt in zip(batch, prompts, strict=True):
            token_ids = next(encoded) if isinstance(prompt, str) else prompt
            yield _request(row, token_ids, row_sampling, limits)


class _Limits:
    """What a prompt must keep to, and how much of the context it leaves."""

    def __init__(self, max_context_tokens: int, vocabulary_size: int) -> None:
        self._max_context_tokens = max_context_tokens
        self._vocabulary_size = vocabulary_size

    def check(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RowError(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")
        if len(token_ids) >= self._max_context_tokens:
            message = (
                f"the prompt has {len(token_ids):,} tokens; the model's context of {self._max_context_tokens:,} "
                f"leaves room for at most {self._max_context_tokens - 1:,}"
            )
            raise RowError(ErrorCode.PROMPT_TOO_LONG, message)
        if min(token_ids) < 0 or max(token_ids) >= self._vocabulary_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self._vocabulary_size)
            message = f"token id {wrong} of the prompt is outside the vocabulary of {self._vocabulary_size:,}"
            raise RowError(ErrorCode.INVALID_TOKEN, message)

    def cut(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        room_tokens = self._max_context_tokens - num_prompt_tokens
        return params if params.max_tokens <= room_tokens else replace(params, max_tokens=room_tokens)


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
        given = values.get(column) if column is not None else None
        if given is None:
            return self.job_params
        if isinstance(given, str):
            try:
                given = orjson.loads(given)
            except orjson.JSONDecodeError as error:
                message = f"column {column!r} is not valid JSON: {error}"
                raise RowError(ErrorCode.INVALID_SAMPLING, message) from error
        if not isinstance(given, dict):
            message = f"column {column!r} holds a {type(given).__name__}, not an object of sampling settings"
            raise RowError(ErrorCode.INVALID_SAMPLING, message)
        params = self._sampling.override(given).params()
        self._check(params)
        return params

    def _check(self, params: SamplingParams) -> None:
        for key, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            wrong = [token_id for token_id in token_ids if not 0 <= token_id < self._vocabulary_size]
            if wrong:
                message = f"{key}: token id {wrong[0]} is outside the vocabulary of {self._vocabulary_size:,}"
                raise RowError(ErrorCode.INVALID_SAMPLING, message)
        if params.logprobs > self._vocabulary_size:
            message = f"logprobs: {params.logprobs} is more than the vocabulary's {self._vocabulary_size:,} tokens"
            raise RowError(ErrorCode.INVALID_SAMPLING, message)


def _prompt(row: Row | FailedRow, renderer: Renderer) -> str | list[int] | RowError | None:
    if isinstance(row, FailedRow):
        return None
    try:
        return renderer.render(row.values)
    except RowError as error:
        return error


def _request(
    row: Row | FailedRow, prompt: list[int] | RowError | None, row_sampling: _RowSampling, limits: _Limits
) -> Request | FailedRow:
    params = row_sampling.job_params
    if isinstance(row, FailedRow):
        return row if params.n == 1 else replace(row, num_samples=params.n)
    try:
        params = row_sampling.of(row.values)
        if isinstance(prompt, RowError):
            raise prompt
        assert prompt is not None
        limits.check(prompt)
    except RowError as error:
        return _failed(row.key, error, params.n)
    token_ids = np.array(prompt, dtype=np.int32)
    return Request(row.key, token_ids, limits.cut(params, len(token_ids)))


def _failed(key: RowKey, error: RowError, num_samples: int) -> FailedRow:
    return FailedRow(key, error.code, error.message, num_samples)
