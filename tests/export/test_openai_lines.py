"""Result and error lines, read by the types of the `openai` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.batch_error import BatchError
from openai.types.chat import ChatCompletion

from batchpipe.export.openai_lines import Answers
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def no_tokenizer() -> Tokenizer:
    raise AssertionError("no completion has log probabilities")


def answers(open_tokenizer: Any = no_tokenizer) -> Answers:
    return Answers("small", 1_700_000_000, "abc", open_tokenizer)


def row(index: int = 0, sample_index: int = 0, **keys: Any) -> dict[str, Any]:
    return {
        "row_id": f"r{index}",
        "row_index": index,
        "sample_index": sample_index,
        "status": "succeeded",
        "completion": f"text {sample_index}",
        "finish_reason": "stop",
        "error_code": None,
        "error_message": None,
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "logprobs": [],
        "url": CHAT,
        **keys,
    }


def failed(index: int = 0, code: str = "empty_prompt", **keys: Any) -> dict[str, Any]:
    return row(index) | {
        "status": "failed",
        "completion": None,
        "finish_reason": None,
        "error_code": code,
        "error_message": "why",
        "prompt_tokens": None,
        "completion_tokens": None,
        **keys,
    }


def lines(rows: list[dict[str, Any]], open_tokenizer: Any = no_tokenizer) -> list[tuple[bool, dict[str, Any]]]:
    return [(is_result, json.loads(line)) for is_result, line in answers(open_tokenizer).lines(rows)]


def body_of(rows: list[dict[str, Any]], open_tokenizer: Any = no_tokenizer) -> dict[str, Any]:
    [(is_result, line)] = lines(rows, open_tokenizer)
    assert is_result and line["response"]["status_code"] == 200 and line["error"] is None
    assert line.keys() == {"id", "custom_id", "response", "error"}
    assert line["response"].keys() == {"status_code", "request_id", "body"}
    body: dict[str, Any] = line["response"]["body"]
    return body


def test_a_chat_is_a_chat_completion() -> None:
    chat = ChatCompletion.model_validate(body_of([row(), row(sample_index=1, finish_reason="length")]), strict=True)
    assert (chat.object, chat.model, chat.created) == ("chat.completion", "small", 1_700_000_000)
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert [choice.message.content for choice in chat.choices] == ["text 0", "text 1"]
    assert [choice.finish_reason for choice in chat.choices] == ["stop", "length"]
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].logprobs is None
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (5, 6, 11)


def test_a_completion_is_a_text_completion() -> None:
    completion = Completion.model_validate(body_of([row(url=COMPLETIONS)]), strict=True)
    assert (completion.object, completion.choices[0].text) == ("text_completion", "text 0")
    assert completion.usage is not None and completion.usage.total_tokens == 8


@pytest.mark.parametrize("other", [{"url": "https://example.org"}, {"url": None}, {"url": ["x"], "body": {"a": 1}}])
def test_rows_of_other_inputs_are_chats(other: dict[str, Any]) -> None:
    assert body_of([row(**other)])["object"] == "chat.completion"


def test_ids_differ_and_stay() -> None:
    rows = [row(0), row(1), row(1, 1), failed(2)]
    first, again = lines(rows), lines(rows)
    assert first == again
    assert [line["custom_id"] for _, line in first] == ["r0", "r1", "r2"]
    ids = [value for _, line in first for value in (line["id"], line["response"]["request_id"])]
    ids += [line["response"]["body"]["id"] for is_result, line in first if is_result]
    assert len(set(ids)) == 8


@pytest.mark.parametrize(
    ("bad", "code", "message", "status"),
    [
        (failed(), "empty_prompt", "why", 400),
        (failed(code="kv_capacity"), "kv_capacity", "why", 500),
        (failed(code="invalid_logits"), "invalid_logits", "why", 500),
        (failed(status="canceled", error_code=None, error_message=None), "canceled", "the request was canceled", 500),
    ],
)
def test_an_error_says_why_at_both_places(bad: dict[str, Any], code: str, message: str, status: int) -> None:
    [(is_result, line)] = lines([bad])
    assert not is_result
    for found in (line["error"], line["response"]["body"]["error"]):
        error = BatchError.model_validate(found, strict=True)
        assert (error.code, error.message) == (code, message)
    assert (line["custom_id"], line["response"]["status_code"]) == ("r0", status)


def test_a_request_with_a_failed_sample_is_one_error() -> None:
    [(is_result, line)] = lines([row(), failed(sample_index=1), failed(sample_index=2)])
    assert not is_result and line["error"]["code"] == "empty_prompt"


def token(token_id: int, logprob: float, **top: float) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": logprob, "top_ids": [70, 71, 72], "top_logprobs": [-0.5, -1.5, -2.5]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("body", "num_top"),
    [
        ('{"logprobs": true}', 0),
        ('{"logprobs": true, "top_logprobs": 2}', 2),
        ('{"logprobs": null}', 3),
        ("{}", 3),
        ("no JSON", 3),
        (None, 3),
    ],
)
def test_logprobs_of_a_chat(tokenizer: Tokenizer, body: str | None, num_top: int) -> None:
    end = 2
    rows = [row(logprobs=[token(70, -0.5), token(80, float("-inf")), token(end, -0.1)], body=body)]
    chat = ChatCompletion.model_validate(body_of(rows, lambda: tokenizer), strict=True)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    first, second = chat.choices[0].logprobs.content  # the end token is no part of the text
    assert (first.token, first.logprob) == (tokenizer.decode([70]), -0.5)
    assert bytes(first.bytes or []).decode() == first.token
    assert second.logprob == -9999.0
    assert [top.logprob for top in first.top_logprobs] == [-0.5, -1.5, -2.5][:num_top]
    assert [top.token for top in first.top_logprobs] == [tokenizer.decode([i]) for i in (70, 71, 72)][:num_top]


@pytest.mark.parametrize(("asked", "num_listed"), [(0, 0), (2, 3)])
def test_logprobs_of_a_completion(tokenizer: Tokenizer, asked: int, num_listed: int) -> None:
    tokens = [token(70, -0.5), token(80, -4.0)]
    rows = [row(url=COMPLETIONS, logprobs=tokens, finish_reason="length", body=json.dumps({"logprobs": asked}))]
    completion = Completion.model_validate(body_of(rows, lambda: tokenizer), strict=True)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.decode([70]), tokenizer.decode([80])]
    assert logprobs.token_logprobs == [-0.5, -4.0]
    assert logprobs.text_offset == [0, len(tokenizer.decode([70]))]
    assert [len(top) for top in logprobs.top_logprobs or []] == ([2, num_listed] if asked else [])


def test_a_job_that_has_logprobs_for_all(tokenizer: Tokenizer) -> None:
    completion = body_of([row(url=COMPLETIONS, logprobs=[token(80, -4.0)], body="{}")], lambda: tokenizer)
    assert len(completion["choices"][0]["logprobs"]["top_logprobs"][0]) == 4


def test_a_part_of_a_character_has_no_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch(["\u4e2d"], add_special_tokens=False)[0]
    assert len(ids) > 1
    body = body_of([row(logprobs=[token(token_id, -1.0) for token_id in ids])], lambda: tokenizer)
    written = body["choices"][0]["logprobs"]["content"]
    assert written[0]["bytes"] is None and "\ufffd" in written[0]["token"]


def test_the_space_of_a_later_token_stays(tmp_path: Path) -> None:
    class Dropping:
        """Drops the space before the first token, as SentencePiece does."""

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
            return "".join({1: " the", 2: " dog"}[token_id] for token_id in token_ids).removeprefix(" ")

    rows = [row(logprobs=[token(1, -1.0) | {"top_ids": []}, token(2, -1.0) | {"top_ids": [1]}])]
    for one in rows[0]["logprobs"]:
        one["top_logprobs"] = one["top_logprobs"][: len(one["top_ids"])]
    written = body_of(rows, Dropping)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in written] == ["the", " dog"]
    assert written[1]["top_logprobs"][0]["token"] == " the"
