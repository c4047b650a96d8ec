"""The errors that a user can cause or mend, and the exit code of the command for each.

    BatchpipeError            exit code
      JobError                2   the job file, an override or the command line is wrong
      StoppedRunError             a run that ended early, in order
        TooManyFailedError    4   more rows failed than output.max_failed_fraction allows
        InterruptedRunError   75  a signal ended the run; the same command continues it
      InputError              5   an input file cannot be read
      ModelError              6   the model cannot be loaded
      MemoryLimitError        7   it does not fit; says how much is missing and which key to change
      OutputError             8   the output folder belongs to another job, or is in use
      WorkerError             1   a stage's process died or stopped answering, again after a restart

Mistakes of batchpipe are `assert`s or other exceptions; the exit code is 1.
`RowError` never leaves the run: it turns one row into a failed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from batchpipe.types import ErrorCode


class BatchpipeError(Exception):
    exit_code: ClassVar[int] = 1


class JobError(BatchpipeError):
    exit_code = 2


class StoppedRunError(BatchpipeError):
    """A run that ended before its last row; `summary` is its closing JSON line, or None if nothing had begun."""

    def __init__(self, message: str, summary: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.summary = summary


class TooManyFailedError(StoppedRunError):
    exit_code = 4


class InputError(BatchpipeError):
    exit_code = 5


class ModelError(BatchpipeError):
    exit_code = 6


class MemoryLimitError(BatchpipeError):
    exit_code = 7


class OutputError(BatchpipeError):
    exit_code = 8


class InterruptedRunError(StoppedRunError):
    exit_code = 75


class WorkerError(BatchpipeError):
    """A stage's process is gone or stopped answering."""


class RowError(Exception):
    """One row fails; the run goes on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
