"""One writer an output folder: a `flock` that the kernel frees however its holder ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import orjson

from batchpipe.errors import OutputError

# `holder` takes the lock for an instant to see whether it is free; a run that starts in this instant tries again.
_ATTEMPTS = 5
_ATTEMPT_SECONDS = 0.02


class FolderLock:
    """Held from construction until `release`. Raises OutputError, naming the holder, where another run has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened for the lock: {error.strerror}.") from error
        try:
            self._acquire()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _acquire(self) -> None:
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_ATTEMPT_SECONDS)
            except OSError as error:
                raise OutputError(
                    f"{self._path}: the file system has no locks ({error.strerror}), so two runs could mix their "
                    "rows; set output.path to a folder on another file system."
                ) from error
            else:
                break
        else:
            in_use_by = _describe(_read_holder(self._path))
            raise OutputError(f"{self._path.parent.parent}: in use by another run, {in_use_by}.")
        if not self._still_there():
            raise OutputError(f"{self._path.parent.parent}: was moved aside by another run just now; run again.")
        self._describe_holder()

    def _still_there(self) -> bool:
        """A run with --fresh may have renamed the folder between our opening the file and our locking it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _describe_holder(self) -> None:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, orjson.dumps(holder), 0)

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> dict[str, object] | None:
    """Who holds the lock file `path` (`host`, `pid`, `since`), None where nobody does. Leaves a held lock alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(path)
    finally:
        os.close(descriptor)
    return None


def _read_holder(path: Path) -> dict[str, object]:
    """What the holder wrote; empty in the instant before it did."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return dict(found)


def _describe(found: dict[str, object]) -> str:
    if not found:
        return "which is just starting"
    return f"process {found['pid']} on {found['host']} since {found['since']}"
