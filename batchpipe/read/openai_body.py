"""The body of an OpenAI request as what our rows are made of: messages or a prompt, and sampling overrides.

What a body leaves out is taken from the job's `sampling`, not from OpenAI's defaults. Our own sampling keys (top_k,
min_p, ...) may stand in a body too, as other servers' extensions do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from batchpipe.errors import RowError
from batchpipe.job.explain import shown, unknown_key
from batchpipe.job.sampling import Sampling
from batchpipe.types import ErrorCode

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# The columns of a row that is made of a body.
MESSAGES, PROMPT, OVERRIDES = "messages", "prompt", "sampling"

_SAMPLING_KEYS = frozenset(Sampling.model_fields) - {"column", "logprobs"}
# Whose request it is, how it is billed and sent: nothing that changes the text.
_WITHOUT_EFFECT = frozenset(
    [
        *("user", "metadata", "store", "service_tier", "safety_identifier", "stream", "stream_options"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    ]
)
# What we cannot do, with the values beside null that ask for nothing.
_UNSUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    CHAT_URL: {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
    COMPLETIONS_URL: {"best_of": (1,), "echo": (False,), "suffix": ("",)},
}
_TEXT_KEYS = {CHAT_URL: "messages", COMPLETIONS_URL: "prompt"}
_OTHER_KEYS = {CHAT_URL: {"logprobs", "top_logprobs"}, COMPLETIONS_URL: {"logprobs"}}


def row_values(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """{MESSAGES or PROMPT: ..., OVERRIDES: {...}} of a body for `url`, one of our two; settings are checked later.

    Raises RowError: URL_MISMATCH for a body of the other url, UNSUPPORTED_PARAMETER for a key that is unknown or asks
    for what we cannot do, MISSING_PROMPT, WRONG_TYPE for several prompts in one request, INVALID_SAMPLING for keys that
    contradict each other.
    """
    text_key = _TEXT_KEYS[url]
    text = body.get(text_key)
    for other_url, other_key in _TEXT_KEYS.items():
        if text is None and body.get(other_key) is not None:
            message = f"url is {url}, and body.{other_key} is for {other_url}"
            raise RowError(ErrorCode.URL_MISMATCH, message)
    _check_keys(url, body)
    if text is None:
        raise RowError(ErrorCode.MISSING_PROMPT, f"body.{text_key} is missing or null")
    return {text_key: _one_prompt(text) if url == COMPLETIONS_URL else text, OVERRIDES: _overrides(url, body)}


def _check_keys(url: str, body: Mapping[str, Any]) -> None:
    unsupported = _UNSUPPORTED[url]
    known = {"model", _TEXT_KEYS[url], "max_completion_tokens", *_OTHER_KEYS[url], *_SAMPLING_KEYS, *_WITHOUT_EFFECT}
    for key, value in body.items():
        if value is None:
            continue
        if key in unsupported:
            if value not in unsupported[key]:
                message = f"body.{key}: is not supported; leave it out (it is {shown(value)})"
                raise RowError(ErrorCode.UNSUPPORTED_PARAMETER, message)
        elif key not in known:
            raise RowError(ErrorCode.UNSUPPORTED_PARAMETER, unknown_key(("body",), key, known))


def _one_prompt(prompt: Any) -> Any:
    """A text or list of token ids, which may also stand alone in a list."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return prompt
    if len(prompt) > 1:
        message = f"body.prompt: holds {len(prompt):,} prompts; give each a line and a custom_id of its own"
        raise RowError(ErrorCode.WRONG_TYPE, message)
    return prompt[0]


def _overrides(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    overrides = {key: value for key, value in body.items() if key in _SAMPLING_KEYS and value is not None}
    limit, older_limit = body.get("max_completion_tokens"), body.get("max_tokens")
    if limit is not None and older_limit is not None and limit != older_limit:
        _refuse(f"body.max_completion_tokens is {shown(limit)} and body.max_tokens {shown(older_limit)}; give one")
    if limit is not None:
        overrides["max_tokens"] = limit
    if isinstance(overrides.get("seed"), int) and not isinstance(overrides["seed"], bool):
        overrides["seed"] &= (1 << 63) - 1  # OpenAI's may be negative, ours may not
    num_logprobs = _num_logprobs(url, body)
    return overrides if num_logprobs is None else {**overrides, "logprobs": num_logprobs}


def _num_logprobs(url: str, body: Mapping[str, Any]) -> Any:
    """Our `logprobs`, to be checked later; None if the body does not say. Ours is at least 1 for the token's own."""
    asked, num_top = body.get("logprobs"), body.get("top_logprobs")
    if url == COMPLETIONS_URL:
        return 1 if asked == 0 and type(asked) is int else asked
    if asked is not None and not isinstance(asked, bool):
        _refuse(f"body.logprobs: {shown(asked)} is not true or false")
    if asked:
        return num_top or 1
    if num_top:
        _refuse("body.top_logprobs: needs logprobs: true")
    return None if asked is None else 0


def _refuse(message: str) -> NoReturn:
    raise RowError(ErrorCode.INVALID_SAMPLING, message)
