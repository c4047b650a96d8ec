"""The writer: every outcome goes to the row log at once, and full row logs become parts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from batchpipe.errors import OutputError
from batchpipe.types import Outcome
from batchpipe.write.crash import crash_point
from batchpipe.write.folder import OutputFolder
from batchpipe.write.open import next_part_number
from batchpipe.write.row_log import RowLog
from batchpipe.write.row_set import RowCounts, summarize
from batchpipe.write.schema import to_batch

# Seconds between two syncs of the row log: a power cut loses at most the rows of this time. The death of the process
# alone loses no row for which `write` has returned.
SYNC_SECONDS = 1.0


class CompletionWriter:
    """Writes outcomes to an open folder; leave it as a context manager, which commits what is pending.

    A background thread writes parts and syncs logs; its errors are raised by the next call.
    """

    def __init__(self, folder: OutputFolder, part_rows: int) -> None:
        """A part is committed once it has `part_rows` completions; the samples of a row stay in one part."""
        self._folder = folder
        self._part_rows = part_rows
        self._part_number = next_part_number(folder)
        self._log: RowLog | None = None
        self._pending: list[pa.RecordBatch] = []
        self._num_pending_rows = 0
        self._last_sync_seconds = time.monotonic()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batchpipe-write")
        self._background: deque[Future[None]] = deque()

    @property
    def counts(self) -> RowCounts:
        """The input rows with an outcome, those of earlier runs included."""
        return self._folder.counts

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Takes the outcomes of rows that have none yet. They survive the death of the process once this returns.

        A call also does a sync that is due, so call it regularly, if need be with no outcomes. Raises OutputError if
        the disk refuses.
        """
        while self._background and self._background[0].done():
            self._background.popleft().result()
        start = 0
        while start < len(outcomes):
            end = self._end_of_part(outcomes, start)
            self._append(to_batch(outcomes[start:end], self._folder.schema))
            start = end
        now_seconds = time.monotonic()
        if self._log is not None and now_seconds - self._last_sync_seconds >= SYNC_SECONDS:
            self._last_sync_seconds = now_seconds
            self._in_background(self._log.sync)

    def finish(self, total_rows: int) -> None:
        """Commits the last part and declares the output complete; `total_rows` is the number of input rows."""
        self._commit_pending()
        self._wait()
        if not self._folder.parts:
            self._folder.commit(0, [])  # so that an empty input still gives a readable table
        self._folder.finish(total_rows)

    def _end_of_part(self, outcomes: Sequence[Outcome], start: int) -> int:
        """The end of the outcomes from `start` on that still belong to the current part."""
        num_rows = self._num_pending_rows
        for end in range(start, len(outcomes)):
            if num_rows >= self._part_rows:
                return end
            num_rows += len(outcomes[end].samples)
        return len(outcomes)

    def _append(self, batch: pa.RecordBatch) -> None:
        self._folder.take(*summarize(batch))
        if self._log is None:
            self._log = RowLog(self._folder.log_path(self._part_number), self._folder.schema)
        self._log.append(batch)
        crash_point("after_log_append")
        self._pending.append(batch)
        self._num_pending_rows += batch.num_rows
        if self._num_pending_rows >= self._part_rows:
            self._commit_pending()

    def _commit_pending(self) -> None:
        if self._log is None:
            return
        self._wait()  # keeps at most two parts in memory: the one being filled and the one being written
        self._in_background(_commit, self._folder, self._part_number, self._pending, self._log)
        self._log = None
        self._pending = []
        self._num_pending_rows = 0
        self._part_number += 1

    def _in_background(self, task: Callable[..., None], *args: object) -> None:
        self._background.append(self._executor.submit(task, *args))

    def _wait(self) -> None:
        while self._background:
            self._background.popleft().result()

    def __enter__(self) -> CompletionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Commits what is pending, also after an interruption, but not after an error of the disk."""
        try:
            if kind is None or not issubclass(kind, OutputError):
                self._commit_pending()
                self._wait()
        finally:
            self._executor.shutdown()
            if self._log is not None:
                self._log.close()


def _commit(folder: OutputFolder, part_number: int, batches: list[pa.RecordBatch], log: RowLog) -> None:
    try:
        folder.commit(part_number, batches)
    finally:
        log.close()
