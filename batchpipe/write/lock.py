"""One writer per output folder: a `flock`, which the kernel releases however the process that holds it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import orjson

from batchpipe.errors import OutputError

# `holder` takes the lock for an instant to see whether it is free, so a run that starts just then tries again.
_ATTEMPTS = 5
_ATTEMPT_SECONDS = 0.02


class PlaceLock(Protocol):
    """What an open output folder asks of its lock."""

    def check(self) -> None:
        """Raises OutputError if another run has taken the folder over."""
        ...

    def release(self) -> None: ...


class FolderLock:
    """The lock on `<output folder>/<state folder>/lock`, held from construction until `release`.

    Raises OutputError, naming the process that holds it, if another run has the lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened for the lock: {error.strerror}.") from error
        try:
            self._acquire()
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        folder = self._path.parent.parent
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_ATTEMPT_SECONDS)
            except OSError as error:
                raise OutputError(
                    f"{self._path}: the file system has no locks ({error.strerror}), so two runs could mix their "
                    "rows; set output.path to a folder on another file system."
                ) from error
        else:
            raise OutputError(f"{folder}: in use by another run, {_describe(_read_holder(self._path))}.")
        # Between the opening of the file and its locking, a run with --fresh may have renamed the folder.
        try:
            was_moved = not os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            was_moved = True
        if was_moved:
            raise OutputError(f"{folder}: was moved aside by another run just now; run again.")
        since = datetime.now(UTC).isoformat("T", "seconds")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, orjson.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}), 0)

    def check(self) -> None:
        """Nothing can take a `flock` from its holder."""

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def holder(path: Path) -> dict[str, object] | None:
    """`host`, `pid` and `since` of the process that holds the lock file `path`; None if the lock is free."""
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
    """What the holder wrote about itself; empty in the instant between its locking and its writing."""
    try:
        return dict(orjson.loads(path.read_bytes()))
    except (OSError, orjson.JSONDecodeError):
        return {}


def _describe(found: dict[str, object]) -> str:
    return f"process {found['pid']} on {found['host']} since {found['since']}" if found else "which is just starting"
