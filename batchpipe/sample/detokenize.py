"""Turns finished requests into the outcomes that are written for their rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from batchpipe.sample.reasoning import ReasoningMarkers
from batchpipe.sample.text import CompletionTexts
from batchpipe.types import (
    Completion,
    ErrorCode,
    FailedRow,
    FinishedRequest,
    FinishReason,
    Outcome,
    Request,
    RowStatus,
    SampleOutcome,
)


def detokenize(
    finished: Sequence[FinishedRequest],
    texts: CompletionTexts,
    eos_token_ids: Collection[int],
    reasoning: ReasoningMarkers | None = None,
) -> list[Outcome]:
    """One outcome per request, in order, with all its samples.

    A final end token counts as a completion token but is never part of the text, even if the tokenizer does not call it
    special. With `reasoning` a completion's reasoning is apart from its answer.
    """
    pairs = [(one.request, completion) for one in finished for completion in one.completions]
    samples: dict[int, SampleOutcome] = {}
    for keep in (False, True):
        places = [place for place, (request, _) in enumerate(pairs) if keeps_special(request, texts, reasoning) == keep]
        chosen = [pairs[place] for place in places]
        prompts = [request.prompt_token_ids.tolist() for request, _ in chosen]
        decoded = texts.texts(prompts, [_text_token_ids(done, eos_token_ids) for _, done in chosen], keep=keep)
        for place, (request, completion), text in zip(places, chosen, decoded, strict=True):
            samples[place] = _sample_outcome(request, completion, text, texts, reasoning)
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
                samples=tuple(samples[place] for place in range(start, end)),
            )
        )
        start = end
    return outcomes


def keeps_special(request: Request, texts: CompletionTexts, reasoning: ReasoningMarkers | None = None) -> bool:
    """Whether special tokens stay in the text while it is searched for stop strings and markers of reasoning."""
    sampling = request.sampling
    marks = (*sampling.stop, *(() if reasoning is None else (reasoning.begin, reasoning.end)))
    return sampling.keep_special_tokens or texts.has_special(marks)


def failed_outcome(row: FailedRow) -> Outcome:
    """The outcome of a row that never reached the engine: all its samples failed for the same reason."""
    sample = _failed_sample(row.code, row.message)
    return Outcome(key=row.key, prompt_tokens=None, predicted_tokens=None, samples=(sample,) * row.num_samples)


def _text_token_ids(completion: Completion, eos_token_ids: Collection[int]) -> tuple[int, ...]:
    token_ids = completion.token_ids
    ended = completion.finish_reason is FinishReason.STOP
    return token_ids[:-1] if ended and token_ids and token_ids[-1] in eos_token_ids else token_ids


def _sample_outcome(
    request: Request, completion: Completion, text: str, texts: CompletionTexts, markers: ReasoningMarkers | None
) -> SampleOutcome:
    if completion.error_code is not None:
        return _failed_sample(completion.error_code, completion.error_message)
    answer, reasoning = text[: completion.text_length], None
    if markers is not None:
        reasoning, answer = markers.split(texts.tail(request.prompt_token_ids.tolist()), answer)
    if not request.sampling.keep_special_tokens and keeps_special(request, texts, markers):
        answer = texts.without_special(answer)
        reasoning = None if reasoning is None else texts.without_special(reasoning)
    canceled = completion.finish_reason is None
    return SampleOutcome(
        status=RowStatus.CANCELED if canceled else RowStatus.SUCCEEDED,
        completion=None if canceled else answer,
        finish_reason=completion.finish_reason,
        error_code=None,
        error_message=None,
        completion_tokens=len(completion.token_ids),
        logprobs=completion.logprobs,
        reasoning=None if canceled else reasoning,
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
