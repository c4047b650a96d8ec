"""One writer per remote output: a lock object that its holder renews, since an object store has no lock of its own.

The object names the working folder (by a token) and the process that wrote last. A run with the same token goes on at
once: the local lock in that folder has shown that its process is gone. Another machine's lock counts while it is
renewed. Two machines that find the object free at the same moment both write it; each reads it again a little later,
and all but the last writer give up. A holder that lost the object stops before its next commit.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from datetime import UTC, datetime

import msgspec

from batchpipe.errors import OutputError
from batchpipe.write.durable import write_whole, writing
from batchpipe.write.lock import FolderLock
from batchpipe.write.place import STATE, Place

LOCK_NAME = f"{STATE}/lock"
RENEW_SECONDS = 30.0
STALE_SECONDS = 300.0
SETTLE_SECONDS = 1.0


class _Holder(msgspec.Struct):
    """The content of the lock object. `renewed_at` is the Unix time in seconds."""

    token: str
    host: str
    pid: int
    renewed_at: float
    released: bool


class RemoteLock:
    """Held from construction until `release`; OutputError, naming the process that holds it, if another run has it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        with writing(place.working):
            place.working.mkdir(parents=True, exist_ok=True)
        self._local = FolderLock(place.working / "lock")
        try:
            self._token = self._take()
        except BaseException:
            self._local.release()
            raise
        self._lost: str | None = None
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="batchpipe-lock", daemon=True)
        self._renewal.start()

    def check(self) -> None:
        """Raises OutputError if another run has taken the output over."""
        if self._lost is not None:
            raise OutputError(self._lost)

    def release(self) -> None:
        self._ended.set()
        self._renewal.join()
        try:
            if self._lost is None:
                self._write(self._token, released=True)
        finally:
            self._local.release()

    def _take(self) -> str:
        token_path = self._place.working / "token"
        token = token_path.read_text() if token_path.exists() else None
        found = _read(self._place)
        if found is not None and found.token != token:
            if _is_held(found):
                raise OutputError(
                    f"{self._place.address}: in use by another run, process {found.pid} on {found.host}, which "
                    f"renewed its lock at {datetime.fromtimestamp(found.renewed_at, UTC):%H:%M:%S} UTC."
                )
            token = None  # another machine went on from here, so what this one had not committed is out of date
        if token is None:
            token = uuid.uuid4().hex
            self._clear_working()
            write_whole(token_path, token.encode())
        is_known = found is not None and found.token == token
        self._write(token, released=False)
        if not is_known:
            time.sleep(SETTLE_SECONDS)
            found = _read(self._place)
            if found is None or found.token != token:
                raise OutputError(f"{self._place.address}: another run began at the same moment; run again later.")
        return token

    def _clear_working(self) -> None:
        for path in self._place.working.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                found = _read(self._place)
                if found is None or found.token != self._token:
                    self._lost = f"{self._place.address}: another run took over this output; nothing more is committed."
                    return
                self._write(self._token, released=False)
            except OutputError:
                continue  # the store may be back by the next time; a commit that it refuses ends the run

    def _write(self, token: str, *, released: bool) -> None:
        holder = _Holder(token, socket.gethostname(), os.getpid(), time.time(), released)
        self._place.write(LOCK_NAME, msgspec.json.encode(holder))

    def __enter__(self) -> RemoteLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def remote_holder(place: Place) -> dict[str, object] | None:
    """`host`, `pid` and `since` (its last renewal) of the process that holds a remote output; None if none does."""
    found = _read(place)
    if found is None or not _is_held(found):
        return None
    since = datetime.fromtimestamp(found.renewed_at, UTC).isoformat("T", "seconds")
    return {"host": found.host, "pid": found.pid, "since": since}


def _is_held(found: _Holder) -> bool:
    return not found.released and time.time() - found.renewed_at < STALE_SECONDS


def _read(place: Place) -> _Holder | None:
    data = place.read(LOCK_NAME)
    try:
        return None if data is None else msgspec.json.decode(data, type=_Holder)
    except msgspec.MsgspecError as error:
        raise OutputError(f"{place / LOCK_NAME}: is no lock of batchpipe ({error}); delete it.") from error
