"""Bodies of OpenAI requests: what becomes of each parameter, and which are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from batchpipe.errors import RowError
from batchpipe.job import Sampling
from batchpipe.read.openai_body import CHAT_URL, COMPLETIONS_URL, MESSAGES, OVERRIDES, PROMPT, row_values
from batchpipe.types import ErrorCode

TALK = [{"role": "user", "content": "hi"}]


def chat(**keys: Any) -> dict[str, Any]:
    values = row_values(CHAT_URL, {"model": "m", "messages": TALK, **keys})
    assert values[MESSAGES] == TALK
    overrides: dict[str, Any] = values[OVERRIDES]
    return overrides


def completion(**keys: Any) -> dict[str, Any]:
    return row_values(COMPLETIONS_URL, {"model": "m", "prompt": "once", **keys})


def refused(url: str, **keys: Any) -> RowError:
    with pytest.raises(RowError) as raised:
        row_values(url, {"messages" if url == CHAT_URL else "prompt": "x", **keys})
    return raised.value


@pytest.mark.parametrize(
    ("keys", "overrides"),
    [
        ({}, {}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": None, "max_tokens": 8}, {"max_tokens": 8}),
        ({"temperature": 0.5, "top_p": 0.9, "n": 3}, {"temperature": 0.5, "top_p": 0.9, "n": 3}),
        ({"stop": "END"}, {"stop": "END"}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"presence_penalty": 1, "frequency_penalty": -1.5}, {"presence_penalty": 1, "frequency_penalty": -1.5}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {"5": -100}}),
        ({"seed": 11}, {"seed": 11}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1}, {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1}),
        ({"logprobs": True}, {"logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 0}, {"logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": 0}),
        ({"stream": True, "stream_options": {"include_usage": True}, "user": "u", "store": True}, {}),
        ({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "functions": None}, {}),
        ({"temperature": None, "unheard_of": None}, {}),
    ],
)
def test_parameters_become_overrides(keys: dict[str, Any], overrides: dict[str, Any]) -> None:
    assert chat(**keys) == overrides
    Sampling().override(overrides)  # which the run will do: all of these are sound


@pytest.mark.parametrize(("asked", "ours"), [(None, {}), (0, {"logprobs": 1}), (4, {"logprobs": 4})])
def test_logprobs_of_a_completion_are_a_number(asked: int | None, ours: dict[str, int]) -> None:
    assert completion(logprobs=asked)[OVERRIDES] == ours


@pytest.mark.parametrize("prompt", ["once", ["once"], [5, 6], [[5, 6]], [], 7])
def test_one_prompt_may_stand_in_a_list(prompt: Any) -> None:
    inner = prompt[0] if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else prompt
    assert completion(prompt=prompt)[PROMPT] == inner


@pytest.mark.parametrize("prompt", [["once", "twice"], [[1], [2], [3]]])
def test_several_prompts_in_one_request_are_refused(prompt: Any) -> None:
    error = refused(COMPLETIONS_URL, prompt=prompt)
    assert error.code == ErrorCode.WRONG_TYPE
    assert f"holds {len(prompt)} prompts; give each a line" in error.message


@pytest.mark.parametrize(
    ("url", "keys", "words"),
    [
        (CHAT_URL, {"tools": [{"type": "function"}]}, "body.tools: is not supported"),
        (CHAT_URL, {"tool_choice": "required"}, "body.tool_choice: is not supported; leave it out (it is 'required')"),
        (CHAT_URL, {"functions": [{"name": "f"}]}, "body.functions: is not supported"),
        (CHAT_URL, {"response_format": {"type": "json_object"}}, "body.response_format: is not supported"),
        (CHAT_URL, {"modalities": ["text", "audio"]}, "body.modalities"),
        (CHAT_URL, {"reasoning_effort": "low"}, "body.reasoning_effort"),
        (CHAT_URL, {"temprature": 1}, "body.temprature: unknown key; did you mean 'temperature'?"),
        (CHAT_URL, {"prompt": "x"}, "body.prompt: unknown key"),
        (CHAT_URL, {"echo": True}, "body.echo: unknown key"),
        (COMPLETIONS_URL, {"echo": True}, "body.echo: is not supported"),
        (COMPLETIONS_URL, {"best_of": 4}, "body.best_of: is not supported"),
        (COMPLETIONS_URL, {"suffix": "end"}, "body.suffix: is not supported"),
        (COMPLETIONS_URL, {"top_logprobs": 2}, "body.top_logprobs: unknown key"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(url: str, keys: dict[str, Any], words: str) -> None:
    error = refused(url, **keys)
    assert error.code == ErrorCode.UNSUPPORTED_PARAMETER
    assert words in error.message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"logprobs": 3}, "body.logprobs: 3 is not true or false"),
        ({"top_logprobs": 3}, "body.top_logprobs: needs logprobs: true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "body.max_completion_tokens is 4 and body.max_tokens 3"),
    ],
)
def test_parameters_that_contradict_each_other(keys: dict[str, Any], words: str) -> None:
    error = refused(CHAT_URL, **keys)
    assert error.code == ErrorCode.INVALID_SAMPLING
    assert words in error.message


@pytest.mark.parametrize(("url", "key"), [(CHAT_URL, "prompt"), (COMPLETIONS_URL, "messages")])
def test_a_body_of_the_other_url(url: str, key: str) -> None:
    with pytest.raises(RowError, match=f"url is {url}, and body.{key} is for /v1/") as raised:
        row_values(url, {"model": "m", key: TALK})
    assert raised.value.code == ErrorCode.URL_MISMATCH


def test_a_body_without_its_text() -> None:
    for url, words in ((CHAT_URL, "body.messages"), (COMPLETIONS_URL, "body.prompt")):
        with pytest.raises(RowError, match=f"{words} is missing or null") as raised:
            row_values(url, {"model": "m"})
        assert raised.value.code == ErrorCode.MISSING_PROMPT
