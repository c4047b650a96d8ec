"""Log probabilities in OpenAI's two forms: that of chats, and the older one of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from batchpipe.model.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI writes for a token that is all but impossible; JSON has no infinity

_Token = Mapping[str, Any]  # of the completions' column `logprobs`


class TokenTexts:
    """What tokens say behind the token before them; some tokenizers drop the space of a token that stands first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = lru_cache(65_536)(lambda *ids: tokenizer.decode(ids, skip_special_tokens=False))
        self._is_silent = lru_cache(1_024)(lambda token_id: not tokenizer.decode([token_id]))

    def after(self, previous_id: int | None, token_id: int) -> str:
        """A token that is part of a character has the text U+FFFD."""
        behind = "" if previous_id is None else self._decode(previous_id, token_id)[len(self._decode(previous_id)) :]
        return behind or self._decode(token_id)

    def spoken(self, tokens: Sequence[_Token], finish_reason: str | None) -> Sequence[_Token]:
        """`tokens` without the end token, which is no part of the text."""
        ended = finish_reason == "stop" and tokens and self._is_silent(tokens[-1]["token_id"])
        return tokens[:-1] if ended else tokens


def chat_logprobs(tokens: Sequence[_Token], texts: TokenTexts, num_top: int | None) -> dict[str, Any]:
    """`num_top` is the number of likeliest tokens to list; None lists all there are."""
    content = []
    previous_id = None
    for token in tokens:
        token_id = token["token_id"]
        listed = list(_top(token))[:num_top]
        content.append(
            _entry(texts.after(previous_id, token_id), token["logprob"])
            | {"top_logprobs": [_entry(texts.after(previous_id, other), logprob) for other, logprob in listed]}
        )
        previous_id = token_id
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[_Token], texts: TokenTexts, num_top: int | None) -> dict[str, Any]:
    """As `chat_logprobs`; the sampled token is listed beside the likeliest if it is none of them."""
    written: list[str] = []
    offsets: list[int] = []
    top: list[dict[str, float]] = []
    previous_id, offset = None, 0
    for token in tokens:
        token_id = token["token_id"]
        text = texts.after(previous_id, token_id)
        written.append(text)
        offsets.append(offset)
        listed = {texts.after(previous_id, other): _finite(logprob) for other, logprob in list(_top(token))[:num_top]}
        top.append({**listed, text: _finite(token["logprob"])})
        previous_id, offset = token_id, offset + len(text)
    return {
        "tokens": written,
        "token_logprobs": [_finite(token["logprob"]) for token in tokens],
        "top_logprobs": None if num_top == 0 else top,
        "text_offset": offsets,
    }


def _top(token: _Token) -> Any:
    return zip(token["top_ids"], token["top_logprobs"], strict=True)


def _entry(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
