"""The writer: outcomes go to the row log at once, and to a part when enough have come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import pyarrow as pa

from batchpipe.errors import OutputError
from batchpipe.types import Outcome
from batchpipe.write.crash import crash_point
from batchpipe.write.folder import OutputFolder
from batchpipe.write.recover import next_part_number
from batchpipe.write.row_log import RowLog
from batchpipe.write.row_set import RowCounts, summarize
from batchpipe.write.schema import to_batch

# A power cut costs at most the rows of this long; the death of the process costs none that `write` returned for.
SYNC_SECONDS = 1.0


class CompletionWriter:
    """Writes outcomes to an open folder; leave it as a context manager, which commits what is pending.

    Parts are written and logs synced by a thread of its own; what fails there is raised by the next call.
    """

    def __init__(self, folder: OutputFolder, part_rows: int) -> None:
        """`part_rows` is how many completions make a part; the samples of a row are never split."""
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
        """Takes the outcomes of rows that have none yet. They survive the death of the process when this returns.

        Call it with none now and then, so that a sync that is due happens. Raises OutputError where the disk refuses.
        """
        while self._background and self._background[0].done():
            self._background.popleft().result()
        start = 0
        while start < len(outcomes):
            end = self._end_of_part(outcomes, start)
            self._append(to_batch(outcomes[start:end], self._folder.schema))
            start = end
        self._sync_when_due()

    def finish(self, total_rows: int) -> None:
        """Commits the last part and declares the output complete; `total_rows` is what the input held."""
        self._commit_pending()
        self._wait()
        if not self._folder.parts:
            self._folder.commit(0, [])  # an empty input still makes a table that can be read
        self._folder.finish(total_rows)

    def _end_of_part(self, outcomes: Sequence[Outcome], start: int) -> int:
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
        self._wait()  # two parts in memory at most: the one that fills and the one that is written
        self._in_background(_commit, self._folder, self._part_number, self._pending, self._log)
        self._log = None
        self._pending = []
        self._num_pending_rows = 0
        self._part_number += 1

    def _sync_when_due(self) -> None:
        now_seconds = time.monotonic()
        if self._log is not None and now_seconds - self._last_sync_seconds >= SYNC_SECONDS:
            self._last_sync_seconds = now_seconds
            self._in_background(self._log.sync)

    def _in_background(self, task: Callable[..., None], *args: object) -> None:
        self._background.append(self._executor.submit(task, *args))

    def _wait(self) -> None:
        while self._background:
            self._background.popleft().result()

    def __enter__(self) -> CompletionWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commits what is pending, also when the run was interrupted; a disk that refused is not asked again."""
        try:
            if exc_type is None or not issubclass(exc_type, OutputError):
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
