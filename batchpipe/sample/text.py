"""The text of generated tokens as it reads behind their prompt.

Some tokenizers write a token differently at the start of a text (a first space is dropped, ...), so a completion is
decoded behind the prompt's last tokens, and its text is what that adds (as tokenizers' `DecodeStream` does).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

# Enough to hold a whole character and a word before the completion; templates end with about as many tokens.
TAIL_TOKENS = 8
_CACHED_TAILS = 4_096


class DecodeBatch(Protocol):
    def __call__(self, token_ids: Sequence[Sequence[int]], /, *, skip_special_tokens: bool = True) -> list[str]: ...


class CompletionTexts:
    """Decodes with one tokenizer. `special_tokens` are the texts of the tokens that decoding may skip."""

    def __init__(self, decode_batch: DecodeBatch, special_tokens: Sequence[str]) -> None:
        self._decode_batch = decode_batch
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._of_tail = lru_cache(_CACHED_TAILS)(self._decoded_tail)

    def has_special(self, texts: Sequence[str]) -> bool:
        """Whether the text of a special token stands in one of `texts`."""
        return self._special is not None and any(map(self._special.search, texts))

    def without_special(self, text: str) -> str:
        return text if self._special is None else self._special.sub("", text)

    def texts(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, keep: bool) -> list[str]:
        """The text of `token_ids[i]` behind `prompts[i]`, with special tokens if `keep`. One call of the tokenizer."""
        tails = [tuple(prompt[-TAIL_TOKENS:]) for prompt in prompts]
        whole = self._decode_batch(
            [(*tail, *ids) for tail, ids in zip(tails, token_ids, strict=True)], skip_special_tokens=not keep
        )
        return [_behind(self._of_tail(tail, keep), text) for tail, text in zip(tails, whole, strict=True)]

    def decoder(self, prompt: Sequence[int], *, keep: bool) -> Callable[[Sequence[int]], str]:
        """`texts` of one prompt, as a function of the tokens behind it."""
        return lambda token_ids: self.texts([prompt], [token_ids], keep=keep)[0]

    def tail(self, prompt: Sequence[int]) -> str:
        """The text of the prompt's last tokens, special ones included."""
        return self._of_tail(tuple(prompt[-TAIL_TOKENS:]), True)

    def _decoded_tail(self, tail: tuple[int, ...], keep: bool) -> str:
        return self._decode_batch([tail], skip_special_tokens=not keep)[0] if tail else ""


def _behind(tail: str, text: str) -> str:
    if text.startswith(tail):
        return text[len(tail) :]
    # The prompt ends within a character that the completion ends.
    return text[len(os.path.commonprefix([tail, text])) :]
