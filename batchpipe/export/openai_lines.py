"""Completions as the lines that OpenAI's batch interface gives back: one line a request, its samples as choices.

A request with a sample that did not succeed is an error as a whole. Its line has the reason at both places where
programs look for it: in `error`, and in the body of a response with a status that is not 200.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson
import xxhash

from batchpipe.export.openai_logprobs import TokenTexts, chat_logprobs, completion_logprobs
from batchpipe.export.plain_lines import Line
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.read.openai_body import COMPLETIONS_URL
from batchpipe.types import ErrorCode, RowStatus

_OURS = {ErrorCode.INVALID_LOGITS, ErrorCode.KV_CAPACITY, RowStatus.CANCELED}

_Row = Mapping[str, Any]  # of the completions table

# What lines are made of; `url` and `body` are a request's, where they were carried.
COLUMNS = frozenset(
    [
        *("row_id", "row_index", "sample_index", "status", "completion", "finish_reason", "error_code"),
        *("error_message", "prompt_tokens", "completion_tokens", "logprobs", "url", "body"),
    ]
)


@dataclass(frozen=True)
class Answers:
    """What the lines of one job share. The same completion always gets the same ids.

    created: seconds since 1970. open_tokenizer: of the model; called if a completion has log probabilities.
    """

    model: str
    created: int
    identity: str
    open_tokenizer: Callable[[], Tokenizer] = field(repr=False)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.open_tokenizer())

    def lines(self, rows: Iterable[_Row]) -> Iterator[Line]:
        """`rows` are completions whose samples are neighbours."""
        for _, group in itertools.groupby(rows, lambda row: row["row_index"]):
            samples = list(group)
            failed = next((row for row in samples if row["status"] != RowStatus.SUCCEEDED), None)
            line = self._result(samples) if failed is None else self._error(failed)
            yield failed is None, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    def _result(self, samples: Sequence[_Row]) -> dict[str, Any]:
        first = samples[0]
        is_chat = first.get("url") != COMPLETIONS_URL
        prompt_tokens, completion_tokens = first["prompt_tokens"], sum(row["completion_tokens"] for row in samples)
        body = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + self._digest("completion", first),
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(row, is_chat) for row in samples],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
        return self._line(first, 200, body, None)

    def _choice(self, row: _Row, is_chat: bool) -> dict[str, Any]:
        tokens = row.get("logprobs") or []
        logprobs = None
        if tokens:
            make = chat_logprobs if is_chat else completion_logprobs
            logprobs = make(self.texts.spoken(tokens, row["finish_reason"]), self.texts, _num_top(row, is_chat))
        text = row["completion"]
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
        return {
            "index": row["sample_index"],
            **said,
            "logprobs": logprobs,
            "finish_reason": row["finish_reason"],
        }

    def _error(self, row: _Row) -> dict[str, Any]:
        code = row["error_code"] or row["status"]
        error = {"code": code, "message": row["error_message"] or f"the request was {code}"}
        kind, status = ("server_error", 500) if code in _OURS else ("invalid_request_error", 400)
        return self._line(row, status, {"error": {**error, "type": kind, "param": None}}, error)

    def _line(self, row: _Row, status: int, body: _Row, error: _Row | None) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{self._digest('request', row)}", "body": body}
        line_id = f"batch_req_{self._digest('line', row)}"
        return {"id": line_id, "custom_id": row["row_id"], "response": response, "error": error}

    def _digest(self, kind: str, row: _Row) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.identity}\0{row['row_index']}\0{kind}".encode())


def _num_top(row: _Row, is_chat: bool) -> int | None:
    """How many of the likeliest tokens the request asked for; None if its body was not carried or does not say."""
    try:
        body = orjson.loads(row.get("body") or "{}")
    except orjson.JSONDecodeError:
        body = {}
    asked = body.get("logprobs") if isinstance(body, dict) else None
    if asked is None or asked is False:
        return None
    num_top: int = (body.get("top_logprobs") or 0) if is_chat else asked
    return num_top
