"""Finds stop strings in a text that arrives token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character is at most four byte tokens: more tokens than this without whole text are not the start of a character.
_MAX_PENDING_TOKENS = 8
_UNFINISHED = "\ufffd"


class StopStrings:
    """Watches one sequence for its stop strings; fed every generated token once, in order, also across preemptions.

    `decode` gives the text of tokens without special tokens. A token alone does not decode as it does behind others
    (spaces, bytes of one character), so the last tokens that made whole text are decoded again before the new ones;
    the text is what they add. A find is confirmed, and its place taken, in the text of all tokens, once. So a token
    costs two short decodes, however long the text.

    A stop string whose last character is of the first `min_tokens` tokens does not count.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...], min_tokens: int) -> None:
        assert stop and all(stop), stop
        self._decode = decode
        self._stop = stop
        self._min_tokens = min_tokens
        self._longest = max(len(text) for text in stop)
        self._token_ids: list[int] = []
        self._window: list[int] = []  # the last tokens that made whole text, then the pending ones
        self._num_context_tokens = 0  # of the window, those before the pending ones
        self._context_length = 0  # characters that they decode to
        self._tail = ""  # the last characters of the text before the pending tokens

    def feed(self, token_id: int) -> int | None:
        """Take the next token; the number of characters of the whole text to keep, once a stop string is in it."""
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
            self._window.pop()  # special tokens, many in a row: without text, and without a bearing on what follows
        return found

    def _advance(self, fresh: str) -> None:
        """The pending tokens made whole text: they become the context of the next ones."""
        self._tail = (self._tail + fresh)[-self._longest :]
        self._window = self._window[self._num_context_tokens :]
        self._num_context_tokens = len(self._window)
        self._context_length = len(self._decode(self._window))

    def _first_in_whole_text(self) -> int | None:
        text = self._decode(self._token_ids)
        exempt = len(self._decode(self._token_ids[: self._min_tokens]).rstrip(_UNFINISHED))
        starts = (text.find(stop, max(0, exempt - len(stop) + 1)) for stop in self._stop)
        return min((start for start in starts if start >= 0), default=None)
