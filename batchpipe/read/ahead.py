"""Reading ahead: an iterator runs in a background thread, so that its consumer seldom waits for a row."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")

CHUNK_ROWS = 64  # rows that the thread hands over at a time
JOIN_SECONDS = 5.0  # how long `close` waits for the thread

logger = logging.getLogger(__name__)


class Ahead(Generic[T]):
    """The items of `iterator` in order, read up to `capacity_rows` and one chunk ahead of the consumer.

    Use it in a `with` statement; its end stops the thread and closes the iterator. An exception of the iterator is
    raised by `take`, after the items that came before it.
    """

    def __init__(self, iterator: Iterator[T], capacity_rows: int) -> None:
        assert capacity_rows > 0
        self._iterator = iterator
        self._capacity_rows = capacity_rows
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_finished = False
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="batchpipe-read", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to take and nothing will come, not even an exception."""
        with self._changed:
            return self._is_finished and not self._ready and self._error is None

    def take(self, max_rows: int, block: bool) -> list[T]:
        """The next rows, at most `max_rows`. An empty list means the end with `block`, else perhaps only "not yet"."""
        with self._changed:
            while block and not (self._ready or self._is_finished):
                self._changed.wait()
            taken = [self._ready.popleft() for _ in range(min(max_rows, len(self._ready)))]
            if not taken and self._error is not None:
                error, self._error = self._error, None
                raise error
            self._changed.notify_all()
            return taken

    def whole(self, timeout_seconds: float) -> list[T] | None:
        """All items, if nothing was taken and the reading ends in time without filling the room; else None.

        They stay to be taken.
        """
        end_seconds = time.monotonic() + timeout_seconds
        with self._changed:
            while not self._is_finished and len(self._ready) < self._capacity_rows:
                left_seconds = end_seconds - time.monotonic()
                if left_seconds <= 0:
                    break
                self._changed.wait(left_seconds)
            return list(self._ready) if self._is_finished and self._error is None else None

    def close(self) -> None:
        """Stops reading and drops the rows that were not taken.

        A thread that is blocked inside a read (a network file that does not answer) is left behind after
        JOIN_SECONDS: it is a daemon thread, so it cannot delay the exit of the process.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("the input has not answered for %.0f seconds; it is left unread", JOIN_SECONDS)

    def _read(self) -> None:
        error: BaseException | None = None
        chunk: list[T] = []
        try:
            for row in self._iterator:
                chunk.append(row)
                if len(chunk) == CHUNK_ROWS:
                    full, chunk = chunk, []
                    if not self._hand_over(full):
                        break
        except BaseException as raised:  # `take` raises it in the consumer's thread
            error = raised
        finally:
            close_iterator = getattr(self._iterator, "close", None)
            if close_iterator is not None:
                close_iterator()
            with self._changed:
                self._ready.extend(chunk)
                self._error = error
                self._is_finished = True
                self._changed.notify_all()

    def _hand_over(self, chunk: list[T]) -> bool:
        """Adds the chunk and waits until there is room for the next one; False once the consumer has closed."""
        with self._changed:
            self._ready.extend(chunk)
            self._changed.notify_all()
            while len(self._ready) >= self._capacity_rows and not self._is_closed:
                self._changed.wait()
            return not self._is_closed
