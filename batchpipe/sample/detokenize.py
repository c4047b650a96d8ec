"""Turns finished requests into the outcomes that are written for their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from batchpipe.types import (
    Completion,
    ErrorCode,
    FailedRow,
    FinishedRequest,
    FinishReason,
    Outcome,
    RowStatus,
    SampleOutcome,
)


def detokenize(
    finished: Sequence[FinishedRequest],
    decode_batch: Callable[[Sequence[Sequence[int]]], Sequence[str]],
    eos_token_ids: Collection[int],
) -> list[Outcome]:
    """One outcome per request, in order, with all its samples.

    `decode_batch` gives the texts of many token lists without special tokens; it is called once. A final end token
    counts as a completion token but is never part of the text, even if the tokenizer does not call it special.
    """
    completions = [completion for one in finished for completion in one.completions]
    texts = decode_batch([_text_token_ids(completion, eos_token_ids) for completion in completions])
    samples = [_sample_outcome(completion, text) for completion, text in zip(completions, texts, strict=True)]
    outcomes = []
    start = 0
    for one in finished:
        end = start + len(one.completions)
        request = one.request
        outcomes.append(
            Outcome(
                key=request.key,
                prompt_tokens=len(request.prompt_token_ids),
                predicted_tokens=request.predicted_tokens,
                samples=tuple(samples[start:end]),
            )
        )
        start = end
    return outcomes


def failed_outcome(row: FailedRow) -> Outcome:
    """The outcome of a row that never reached the engine: all its samples failed for the same reason."""
    sample = _failed_sample(row.code, row.message)
    return Outcome(key=row.key, prompt_tokens=None, predicted_tokens=None, samples=(sample,) * row.num_samples)


def _text_token_ids(completion: Completion, eos_token_ids: Collection[int]) -> tuple[int, ...]:
    token_ids = completion.token_ids
    ended = completion.finish_reason is FinishReason.STOP
    return token_ids[:-1] if ended and token_ids and token_ids[-1] in eos_token_ids else token_ids


def _sample_outcome(completion: Completion, text: str) -> SampleOutcome:
    if completion.error_code is not None:
        return _failed_sample(completion.error_code, completion.error_message)
    canceled = completion.finish_reason is None
    return SampleOutcome(
        status=RowStatus.CANCELED if canceled else RowStatus.SUCCEEDED,
        completion=None if canceled else text[: completion.text_length],
        finish_reason=completion.finish_reason,
        error_code=None,
        error_message=None,
        completion_tokens=len(completion.token_ids),
        logprobs=completion.logprobs,
    )


def _failed_sample(code: ErrorCode, message: str | None) -> SampleOutcome:
    return SampleOutcome(
        status=RowStatus.FAILED,
        completion=None,
        finish_reason=None,
        error_code=code,
        error_message=message,
        completion_tokens=None,
    )
