"""Reading ahead: an iterator runs in a thread of its own, so that whoever takes from it seldom waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

CHUNK_ROWS = 64  # are handed over at a time


class Ahead(Generic[T]):
    """What `iterator` gives, up to `capacity_rows` (and one chunk) ahead of its consumer, in order.

    Used in a `with` statement, whose end stops the thread and closes the iterator. An exception of the iterator is
    raised by `take`, after what came before it.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def exhausted(self) -> bool:
        """Nothing is left to take and nothing will come, not even an exception."""
        with self._changed:
            return self._is_finished and not self._ready and self._error is None

    def take(self, max_rows: int, block: bool) -> list[T]:
        """The next rows, `max_rows` at most. None of them: with `block` the end, without it maybe just not yet."""
        with self._changed:
            while block and not (self._ready or self._is_finished):
                self._changed.wait()
            taken = [self._ready.popleft() for _ in range(min(max_rows, len(self._ready)))]
            if not taken and self._error is not None:
                error, self._error = self._error, None
                raise error
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Stops reading; what was not taken is dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

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
        except BaseException as raised:  # the consumer's to handle: `take` raises it there
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
        """Adds the chunk and waits until there is room for the next; False where nobody wants more."""
        with self._changed:
            self._ready.extend(chunk)
            self._changed.notify_all()
            while len(self._ready) >= self._capacity_rows and not self._is_closed:
                self._changed.wait()
            return not self._is_closed
