from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe.sample.detokenize import detokenize, failed_outcome
from batchpipe.sample.reasoning import ReasoningMarkers
from batchpipe.sample.text import CompletionTexts
from batchpipe.types import (
    Carried,
    Completion,
    ErrorCode,
    FailedRow,
    FinishedRequest,
    FinishReason,
    Outcome,
    Request,
    RowKey,
    RowStatus,
    SampleOutcome,
    TokenLogprobs,
)
from tests.sample.sampling_cases import settings

EOS = 9
KEY = RowKey(4, "row-4", Carried(pa.record_batch({}), 0))


LETTERS = [*"abcdefghij", "<s>"]  # the last one is a special token
SPECIAL = 10


def decode_batch(token_lists: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
    return [
        "".join(LETTERS[token_id] for token_id in token_ids if not (skip_special_tokens and token_id == SPECIAL))
        for token_ids in token_lists
    ]


TEXTS = CompletionTexts(decode_batch, ["<s>"])


def finished(*completions: Completion, predicted: int | None = None) -> FinishedRequest:
    request = Request(KEY, np.array([1, 2, 3], np.int32), settings(n=len(completions)), predicted)
    return FinishedRequest(request, completions)


def only_sample(completion: Completion) -> SampleOutcome:
    (outcome,) = detokenize([finished(completion)], TEXTS, {EOS})
    (sample,) = outcome.samples
    return sample


def sample_outcome(**changes: Any) -> SampleOutcome:
    values: dict[str, Any] = {
        "status": RowStatus.SUCCEEDED,
        "completion": None,
        "finish_reason": None,
        "error_code": None,
        "error_message": None,
        "completion_tokens": None,
    }
    return SampleOutcome(**(values | changes))


def test_the_end_token_counts_but_does_not_show() -> None:
    found = only_sample(Completion((0, 1, EOS), FinishReason.STOP))
    assert found == sample_outcome(completion="ab", finish_reason=FinishReason.STOP, completion_tokens=3)


def test_a_stop_token_that_is_text_shows() -> None:
    assert only_sample(Completion((0, 1, 2), FinishReason.STOP)).completion == "abc"


def test_an_ignored_end_token_at_full_length_is_left_to_the_tokenizer() -> None:
    assert only_sample(Completion((0, EOS), FinishReason.LENGTH)).completion == "aj"


def test_a_stop_string_cuts_the_text_and_not_the_count() -> None:
    found = only_sample(Completion((0, 1, 2, 3), FinishReason.STOP, text_length=1))
    assert (found.completion, found.completion_tokens) == ("a", 4)
    assert only_sample(Completion((0, 1), FinishReason.STOP, text_length=0)).completion == ""


def test_a_failed_sample_has_a_code_and_no_text() -> None:
    found = only_sample(
        Completion((0,), None, error_code=ErrorCode.INVALID_LOGITS, error_message="logits were not finite")
    )
    assert found == sample_outcome(
        status=RowStatus.FAILED, error_code=ErrorCode.INVALID_LOGITS, error_message="logits were not finite"
    )


def test_a_sample_without_an_end_was_canceled() -> None:
    assert only_sample(Completion((0, 1), None)) == sample_outcome(status=RowStatus.CANCELED, completion_tokens=2)


def test_requests_keep_their_samples_and_order_in_one_decode() -> None:
    calls = []

    def counting_decode(token_lists: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        calls.append(len(token_lists))
        return decode_batch(token_lists, skip_special_tokens=skip_special_tokens)

    logprobs = (TokenLogprobs(2, -0.5, (2,), (-0.5,)),)
    outcomes = detokenize(
        [
            finished(Completion((0,), FinishReason.LENGTH), Completion((1,), FinishReason.LENGTH), predicted=7),
            finished(Completion((2,), FinishReason.LENGTH, logprobs=logprobs)),
        ],
        CompletionTexts(counting_decode, []),
        {EOS},
    )
    assert calls == [3, 1, 0]  # all completions at once, the end that all prompts have, none with special tokens
    assert [[sample.completion for sample in outcome.samples] for outcome in outcomes] == [["a", "b"], ["c"]]
    assert [(one.key, one.prompt_tokens, one.predicted_tokens) for one in outcomes] == [(KEY, 3, 7), (KEY, 3, None)]
    assert outcomes[1].samples[0].logprobs == logprobs


def one_text(token_ids: tuple[int, ...], text_length: int | None = None, **sampling: Any) -> str | None:
    request = Request(KEY, np.array([1], np.int32), settings(**sampling))
    done = Completion(token_ids, FinishReason.STOP, text_length=text_length)
    (outcome,) = detokenize([FinishedRequest(request, (done,))], TEXTS, {EOS})
    return outcome.samples[0].completion


def test_special_tokens_are_kept_where_the_row_asks_for_them() -> None:
    assert one_text((0, SPECIAL, 1, EOS)) == "ab"
    assert one_text((0, SPECIAL, 1, EOS), keep_special_tokens=True) == "a<s>b"


def test_a_stop_string_may_hold_special_tokens() -> None:
    """Its place counts them; the text does not show them."""
    assert one_text((SPECIAL, 0, 1, SPECIAL), text_length=5, stop=("<s>",)) == "ab"
    assert one_text((SPECIAL, 0, 1, SPECIAL), text_length=5, stop=("<s>",), keep_special_tokens=True) == "<s>ab"


def test_reasoning_stands_apart() -> None:
    request = Request(KEY, np.array([1], np.int32), settings())
    done = Completion((2, 0, 3, 1), FinishReason.STOP)
    (outcome,) = detokenize([FinishedRequest(request, (done,))], TEXTS, {EOS}, ReasoningMarkers("c", "d"))
    assert (outcome.samples[0].reasoning, outcome.samples[0].completion) == ("a", "b")


def test_nothing_finished() -> None:
    assert detokenize([], TEXTS, {EOS}) == []


def test_a_failed_row_fails_every_sample() -> None:
    sample = sample_outcome(status=RowStatus.FAILED, error_code=ErrorCode.EMPTY_PROMPT, error_message="empty")
    assert failed_outcome(FailedRow(KEY, ErrorCode.EMPTY_PROMPT, "empty", num_samples=2)) == Outcome(
        KEY, None, None, (sample, sample)
    )
