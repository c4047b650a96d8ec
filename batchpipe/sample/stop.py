"""Finds stop strings in a text that arrives token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character has at most four bytes, so more tokens than this that give no complete text do not begin a character.
_MAX_PENDING_TOKENS = 8
_UNFINISHED = "\ufffd"


class StopStrings:
    """Watches one sequence for its stop strings. `feed` takes every generated token once, in order, across preemptions.

    `decode` gives the text of tokens without special tokens. A token's text depends on the tokens before it (spaces,
    characters of several tokens), so the last tokens that gave complete text are decoded together with the new ones,
    and the new text is what these add. This takes two short decodes per token, whatever the length of the text. A match
    is confirmed and located once, in the decoded text of all tokens.

    A match that ends within the first `min_tokens` tokens does not count.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...], min_tokens: int) -> None:
        assert stop and all(stop), stop
        self._decode = decode
        self._stop = stop
        self._min_tokens = min_tokens
        self._longest = max(len(text) for text in stop)
        self._token_ids: list[int] = []
        self._window: list[int] = []  # the last tokens that gave complete text, then the pending ones
        self._num_context_tokens = 0  # tokens of the window before the pending ones
        self._context_length = 0  # number of characters of their text
        self._tail = ""  # the last characters of the text before the pending tokens

    def feed(self, token_id: int) -> int | None:
        """Takes the next token; returns the number of characters to keep once the text has a stop string, else None."""
        self._token_ids.append(token_id)
        self._window.append(token_id)
        fresh = self._decode(self._window)[self._context_length :]
        found = None
        if len(self._token_ids) > self._min_tokens:
            text = self._tail + fresh.rstrip(_UNFINISHED)
            if any(stop in text for stop in self._stop):
                found = self._first_in_whole_text()
        num_pending = len(self._window) - self._num_context_tokens
        if fresh and (not fresh.endswith(_UNFINISHED) or num_pending > _MAX_PENDING_TOKENS):
            self._advance(fresh)
        elif not fresh and num_pending > _MAX_PENDING_TOKENS:
            self._window.pop()  # a special token in a run of many, without text or influence on later text
        return found

    def _advance(self, fresh: str) -> None:
        """The pending tokens gave complete text, so they become the context of the next ones."""
        self._tail = (self._tail + fresh)[-self._longest :]
        self._window = self._window[self._num_context_tokens :]
        self._num_context_tokens = len(self._window)
        self._context_length = len(self._decode(self._window))

    def _first_in_whole_text(self) -> int | None:
        text = self._decode(self._token_ids)
        exempt = len(self._decode(self._token_ids[: self._min_tokens]).rstrip(_UNFINISHED))
        starts = (text.find(stop, max(0, exempt - len(stop) + 1)) for stop in self._stop)
        return min((start for start in starts if start >= 0), default=None)
